//! A disk that can be full: a small file system in memory.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A small file system, as long as the value lives.
#[derive(Debug)]
pub struct Small(TempDir);

impl Small {
    /// Mounts one; `None` without the rights to. Whoever asks sees that; as root, and so in the checks of each change, it runs.
    pub fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().ok()?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=384m,mode=1777", "eventbus"]).arg(folder.path());
        let small = mount.output().is_ok_and(|output| output.status.success()).then_some(Self(folder));
        if small.is_none() {
            println!("SKIPPED: mounting a small disk takes root");
        }
        small
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    /// Leaves so many bytes, or none.
    ///
    /// # Errors
    /// What the system says; also if it cannot be filled.
    pub fn fill_but(&self, spare: u64) -> std::io::Result<()> {
        let ballast = self.folder().join("ballast");
        let dd = Command::new("dd").arg("if=/dev/zero").arg(format!("of={}", ballast.display())).output()?;
        if dd.status.success() {
            return Err(std::io::Error::other("there is room without end"));
        }
        let file = std::fs::OpenOptions::new().write(true).open(&ballast)?;
        file.set_len(file.metadata()?.len().saturating_sub(spare))
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// It was not filled.
    pub fn free(&self) -> std::io::Result<()> {
        std::fs::remove_file(self.folder().join("ballast"))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(self.folder()).output());
    }
}
