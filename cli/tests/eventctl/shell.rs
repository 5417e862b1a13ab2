//! A shell in a folder of its own, with buses and a configuration that nobody else sees.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

pub(crate) struct Shell {
    folder: tempfile::TempDir,
}

impl Shell {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The address of a bus by name; commands run on `a` where they name none.
    pub(crate) fn url(&self, name: &str) -> String {
        format!("sqlite://{}/{name}.db", self.folder.path().display())
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_eventctl"));
        command.env("XDG_CONFIG_HOME", self.folder.path().join("config")).current_dir(self.folder.path());
        command.env_remove("EVENTCTL_CONTEXT").args(arguments);
        command
    }

    /// Runs with something on standard input.
    pub(crate) fn run_with(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = self.command(arguments);
        if !arguments.contains(&"-c") && arguments.first() != Some(&"context") {
            command.args(["-c", &self.url("a")]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
        child.wait_with_output().unwrap()
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, "")
    }

    /// Exit code, standard output, standard error.
    pub(crate) fn told(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = self.run(arguments);
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }

    /// Runs, expects success, returns what is on standard output.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = self.told(arguments);
        assert_eq!(code, 0, "{arguments:?}: {stderr}");
        stdout
    }

    /// The same, as lines of JSON.
    pub(crate) fn lines(&self, arguments: &[&str]) -> Vec<Value> {
        self.ok(arguments).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(crate) fn code(&self, arguments: &[&str]) -> (i32, String) {
        let (code, _, stderr) = self.told(arguments);
        (code, stderr)
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
