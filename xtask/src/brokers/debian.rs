//! Programs of Debian 13 in a root of their own: later versions of some brokers than the system has.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::fetch::{apt, cache, program, rename, run};
use super::recipe::Launch;
use super::{Kind, Result};

const SUITE: &str = "trixie";

/// The package that a version of a broker comes from, if it is one of these.
pub(super) fn package(kind: Kind, version: Option<&str>) -> Option<&'static str> {
    match (kind, version) {
        (Kind::Postgres, Some("17")) => Some("postgresql"),
        (Kind::Rabbitmq, Some("4")) => Some("rabbitmq-server"),
        (Kind::Redis, Some("8")) => Some("redis-server"),
        _ => None,
    }
}

/// The root, with what was installed in it.
pub(super) struct Root(PathBuf);

impl Root {
    /// Unpacks the root once, and installs a package in it, once. Takes root's rights and two minutes.
    pub(super) fn with(package: &str) -> Result<Self> {
        let place = cache()?.join(format!("debian-{SUITE}"));
        if !place.is_dir() {
            if program(&["debootstrap"], &["/usr/sbin"]).is_none() {
                apt("debootstrap")?;
            }
            let fresh = cache()?.join(format!("debian-{SUITE}.{}", std::process::id()));
            run(Command::new("debootstrap").args(["--variant=minbase", SUITE]).arg(&fresh))?;
            rename(&fresh, &place)?;
        }
        let root = Self(place);
        if root.run(&["dpkg", "--status", package]).is_err() {
            root.run(&["apt-get", "update"])?;
            root.run(&["apt-get", "install", "--yes", "--no-install-recommends", package])?;
        }
        Ok(root)
    }

    fn run(&self, line: &[&str]) -> Result<String> {
        let mut command = Command::new("chroot");
        // Without an init, packages must not start what they bring.
        run(command.arg(&self.0).args(line).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8"))
    }

    /// Where folders for data are made.
    pub(super) fn folders(&self) -> PathBuf {
        self.0.join("tmp")
    }

    /// A place of the root as programs in it see it.
    pub(super) fn inside(&self, place: &Path) -> PathBuf {
        place.strip_prefix(&self.0).map_or_else(|_| place.to_owned(), |inner| Path::new("/").join(inner))
    }

    /// A program that runs in the root, as one of its users.
    pub(super) fn command(&self, user: &str, program: &str) -> Command {
        let mut command = Command::new("chroot");
        command.arg(format!("--userspec={user}")).arg(&self.0).arg(program).env("LC_ALL", "C.UTF-8");
        command
    }

    /// Has a broker that was prepared for the root start in it.
    pub(super) fn enclose(&self, user: &str, launch: Launch) -> Launch {
        let mut arguments = vec![format!("--userspec={user}"), self.0.display().to_string()];
        arguments.push(launch.program.display().to_string());
        arguments.extend(launch.arguments);
        let sweep = match launch.sweep.as_str() {
            "" => String::new(),
            sweep => format!("chroot {} {sweep}", self.0.display()),
        };
        let mut environment = launch.environment;
        environment.push(("LC_ALL", "C.UTF-8".to_owned()));
        Launch { program: "chroot".into(), arguments, environment, user: None, sweep, ..launch }
    }
}
