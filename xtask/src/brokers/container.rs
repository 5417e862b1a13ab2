//! A broker as a container of its official image.

use std::collections::HashMap;
use std::net::TcpStream;
use std::process::Child;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use testcontainers::bollard::Docker;
use testcontainers::bollard::query_parameters::{
    KillContainerOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder,
};
use testcontainers::core::IntoContainerPort as _;
use testcontainers::core::client::docker_client_instance;
use testcontainers::runners::AsyncRunner as _;
use testcontainers::{GenericImage, ImageExt as _};

use super::fetch::program;
use super::image::{self, Image};
use super::process::{PATIENCE, free_port, watch};
use super::{Kind, Result};

/// A container that runs until it is removed.
#[derive(Debug)]
pub(super) struct Container {
    id: String,
    image: Image,
    port: u16,
    /// Whether it is removed with this value.
    is_owned: bool,
    /// Removes the container when our end of its input closes: also if we are killed.
    watch: Option<Child>,
}

/// True if an engine of this machine answers: one elsewhere opens ports that are not ours.
pub(super) fn engine_answers() -> bool {
    let is_here = std::env::var("DOCKER_HOST").map_or(true, |host| host.starts_with("unix:"))
        && !std::path::Path::new("/.dockerenv").exists();
    is_here && wait_for(async { engine().await?.ping().await.map_err(text) }).is_ok()
}

impl Container {
    /// Starts one and waits until it can be used. A broker that names itself to its clients names the advertised port.
    pub(super) fn start(kind: Kind, tag: Option<&str>, advertised: Option<u16>) -> Result<Self> {
        let port = free_port()?;
        let image = image::of(kind, tag, advertised.unwrap_or(port));
        let name = format!("eventbus-{kind}-{}-{port}", std::process::id());
        let id = wait_for(run(&image, port, &name)).map_err(|problem| {
            // It may have been made, and not started.
            drop(remove(&name));
            format!(
                "{kind}: {image} did not start: {problem}\n{} takes a process of this machine instead",
                "EVENTBUS_BROKERS=processes"
            )
        })?;
        let container = Self { id, image, port, is_owned: false, watch: None };
        let ready = wait_for(container.ready(container.image.says_at_first));
        match ready {
            Ok(()) => Ok(container),
            Err(problem) => {
                drop(remove(&container.id));
                Err(problem)
            }
        }
    }

    /// Has it end with this process, however that ends. Needs the client program of the engine; without one it ends
    /// with its value alone.
    pub(super) fn tied(mut self) -> Result<Self> {
        self.is_owned = true;
        if let Some(docker) = program(&["docker"], &[]) {
            let remove = format!("{} rm --force --volumes {}", docker.display(), self.id);
            self.watch = Some(watch(&remove)?);
        }
        Ok(self)
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn image(&self) -> &Image {
        &self.image
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn url(&self) -> String {
        self.image.url(self.port)
    }

    /// Ends it as a crash does; its data stay.
    pub(super) fn crash(&self) -> Result<()> {
        wait_for(async {
            let kill = KillContainerOptionsBuilder::new().signal("KILL").build();
            let docker = engine().await?;
            docker.kill_container(&self.id, Some(kill)).await.map_err(text)?;
            // The engine notes the end a moment later, and would refuse a start until then.
            let end = Instant::now() + PATIENCE;
            while is_running(&docker, &self.id).await? && Instant::now() < end {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        })
    }

    /// Starts it again on its data and port.
    pub(super) fn start_again(&self) -> Result<()> {
        wait_for(async {
            let docker = engine().await?;
            let said = said(&docker, &self.id).await?;
            docker.start_container(&self.id, None).await.map_err(text)?;
            self.ready(said.matches(self.image.ready).count() + 1).await
        })
    }

    /// Stops all its processes in the middle of whatever they do, or lets them go on.
    pub(super) fn freeze(&self, on: bool) -> Result<()> {
        wait_for(async {
            let docker = engine().await?;
            let done = match on {
                true => docker.pause_container(&self.id).await,
                false => docker.unpause_container(&self.id).await,
            };
            done.map_err(text)
        })
    }

    /// Waits until it has said so often that it is ready, and its port answers.
    async fn ready(&self, times: usize) -> Result<()> {
        let docker = engine().await?;
        let end = Instant::now() + PATIENCE;
        loop {
            let said = said(&docker, &self.id).await?;
            if said.matches(self.image.ready).count() >= times
                && TcpStream::connect(("127.0.0.1", self.port)).is_ok()
            {
                return Ok(());
            }
            if Instant::now() > end || !is_running(&docker, &self.id).await? {
                let lines: Vec<&str> = said.lines().collect();
                let tail = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default();
                return Err(format!("{} did not start:\n{}", self.image, tail.join("\n")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.is_owned {
            drop(remove(&self.id));
        }
        if let Some(mut watch) = self.watch.take() {
            drop(watch.stdin.take());
            drop(watch.wait());
        }
    }
}

/// True if a container is there and runs.
pub(super) fn lives(id: &str) -> bool {
    wait_for(async { is_running(&engine().await?, id).await }).unwrap_or(false)
}

/// Ends a container and removes it with its data.
pub(super) fn remove(id: &str) -> Result<()> {
    wait_for(async {
        let all = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        engine().await?.remove_container(id, Some(all)).await.map_err(text)
    })
}

/// Runs an image; what it runs as stays until it is removed by its name.
async fn run(image: &Image, port: u16, name: &str) -> Result<String> {
    let mut request = GenericImage::new(image.name, &image.tag)
        .with_startup_timeout(PATIENCE)
        .with_container_name(name)
        .with_mapped_port(port, image.port.tcp())
        // The password is known to all: nobody outside of this machine should reach it.
        .with_host_config_modifier(|host| {
            let bindings = host.port_bindings.iter_mut().flat_map(|ports| ports.values_mut());
            bindings.flatten().flatten().for_each(|binding| binding.host_ip = Some("127.0.0.1".to_owned()));
        })
        .with_labels(HashMap::from([("eventbus", "broker")]));
    if !image.command.is_empty() {
        request = request.with_cmd(image.command.iter().cloned());
    }
    for (name, value) in &image.environment {
        request = request.with_env_var(*name, value);
    }
    let container = request.start().await.map_err(text)?;
    let id = container.id().to_owned();
    // It would be removed with the value, and could not outlive a command.
    std::mem::forget(container);
    Ok(id)
}

async fn engine() -> Result<Docker> {
    docker_client_instance().await.map_err(text)
}

async fn is_running(docker: &Docker, id: &str) -> Result<bool> {
    let found = docker.inspect_container(id, None).await.map_err(text)?;
    Ok(found.state.and_then(|state| state.running).unwrap_or(false))
}

/// All that it said since it was made.
async fn said(docker: &Docker, id: &str) -> Result<String> {
    let all = LogsOptionsBuilder::new().stdout(true).stderr(true).build();
    let parts: Vec<_> = docker.logs(id, Some(all)).try_collect().await.map_err(text)?;
    Ok(parts.iter().map(|part| String::from_utf8_lossy(part.as_ref()).into_owned()).collect())
}

/// Waits for an answer of the engine on a thread of its own: who asks may be inside of a runtime.
fn wait_for<T: Send>(work: impl Future<Output = Result<T>> + Send) -> Result<T> {
    /// One for all: connections to the engine live in it.
    static RUNTIME: LazyLock<std::io::Result<tokio::runtime::Runtime>> =
        LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build());
    let runtime = RUNTIME.as_ref().map_err(ToString::to_string)?;
    std::thread::scope(|scope| scope.spawn(|| runtime.block_on(work)).join())
        .unwrap_or_else(|_| Err("the thread that waited for the container engine panicked".to_owned()))
}

fn text(error: impl std::error::Error) -> String {
    // With what is below: the outer words alone seldom name the cause.
    let mut said = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_said = inner.to_string();
        if !said.contains(&inner_said) {
            said = format!("{said}: {inner_said}");
        }
        source = inner.source();
    }
    said
}
