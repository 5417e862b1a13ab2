//! A PostgreSQL whose syncs take a known time: what a disk adds differs from minute to minute, and measurements with it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Result;
use super::fetch::run;
use super::recipe::Launch;

/// Has a library loaded before the system's, whose sync sleeps for so long, below a second.
pub(super) fn apply(launch: &mut Launch, folder: &Path, sync: Duration) -> Result<()> {
    let (source, library) = (folder.join("sync.c"), folder.join("sync.so"));
    std::fs::write(&source, include_str!("sync.c")).map_err(|error| error.to_string())?;
    let nanos = format!("-DSYNC_NANOS={}", sync.subsec_nanos());
    run(Command::new("cc").args(["-shared", "-fPIC", "-O2", &nanos, "-o"]).arg(&library).arg(&source))?;
    // The server's user is another one.
    let readable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&library, readable).map_err(|error| error.to_string())?;
    launch.environment.push(("LD_PRELOAD", library.display().to_string()));
    // No checkpoint in the middle, and none that was due to the one before.
    let settings = ["max_wal_size=16GB", "checkpoint_timeout=1h", "wal_sync_method=fdatasync"];
    for setting in settings {
        launch.arguments.extend(["-c".to_owned(), setting.to_owned()]);
    }
    Ok(())
}
