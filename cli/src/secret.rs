//! Passwords of contexts, which the configuration names and does not hold.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::exit::{Failure, Outcome};

/// Where a password is.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Secret {
    /// A variable of the environment.
    Env(String),
    /// The first line of a file.
    File(String),
    /// The first line that a shell's command writes.
    Command(String),
}

impl Secret {
    /// Reads it.
    ///
    /// # Errors
    /// Usage: it is not there. Nothing of it is in the error.
    pub(crate) fn read(&self) -> Outcome<String> {
        let missing = |why: String| Failure::Usage(format!("the password of the context: {self}: {why}"));
        let text = match self {
            Self::Env(name) => {
                std::env::var(name).map_err(|_| missing("it is not set, or no text".into()))?
            }
            Self::File(path) => std::fs::read_to_string(path).map_err(|error| missing(error.to_string()))?,
            Self::Command(command) => {
                let mut shell = std::process::Command::new("sh");
                // What it says to its user is shown; an agent may ask on the terminal.
                let shell = shell.arg("-c").arg(command).stderr(std::process::Stdio::inherit());
                let done = shell.output().map_err(|error| missing(error.to_string()))?;
                if !done.status.success() {
                    return Err(missing(format!("it ended with {}", done.status)));
                }
                String::from_utf8(done.stdout).map_err(|_| missing("it wrote no text".into()))?
            }
        };
        match text.lines().next() {
            Some(line) if !line.is_empty() => Ok(line.to_owned()),
            _ => Err(missing("it is empty".into())),
        }
    }

    /// Whether it runs a program: only a user's own configuration may have that.
    pub(crate) fn runs_a_program(&self) -> bool {
        matches!(self, Self::Command(_))
    }

    /// An address with this password, for its user.
    ///
    /// # Errors
    /// As [`read`](Self::read). Usage: the address names no user, or has a password.
    pub(crate) fn put_into(&self, url: &str) -> Outcome<String> {
        let (place, options) =
            url.split_once('?').map_or((url, None), |(place, options)| (place, Some(options)));
        let user = place.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@')).map(|(user, _)| user);
        let (Some(user), Some((before, host))) = (user, place.rsplit_once('@')) else {
            return Err(Failure::Usage(
                "a context with a password has an address with a user: scheme://user@host".into(),
            ));
        };
        if user.contains(':') {
            return Err(Failure::Usage("the address of the context has a password already".into()));
        }
        let mut whole = format!("{before}:{}@{host}", escaped(&self.read()?));
        if let Some(options) = options {
            whole.push('?');
            whole.push_str(options);
        }
        Ok(whole)
    }
}

/// Every byte that may mean something in an address, as `%xx`.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

impl FromStr for Secret {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("env", name)) if !name.is_empty() => Ok(Self::Env(name.to_owned())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.to_owned())),
            Some(("cmd", command)) if !command.is_empty() => Ok(Self::Command(command.to_owned())),
            // What was written may be the password itself: it is not repeated.
            _ => Err("a password is named, as env:NAME, file:PATH or cmd:COMMAND (a keyring's is cmd:secret-tool lookup …)"
                .to_owned()),
        }
    }
}

impl TryFrom<String> for Secret {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Secret> for String {
    fn from(secret: Secret) -> Self {
        secret.to_string()
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{path}"),
            Self::Command(command) => write!(f, "cmd:{command}"),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::Secret;

    #[test]
    fn a_password_goes_into_its_address_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        std::fs::write(&file, "a/b@c:d%?é\nsecond line\n").unwrap();
        let secret: Secret = format!("file:{}", file.display()).parse().unwrap();
        let url = secret.put_into("kafka://me@a:1,b:2?tls=on").unwrap();
        let url = eventbus::url::Url::parse(&url).unwrap();
        let authority = url.authority(9092).unwrap();
        assert_eq!((authority.user, authority.password), (Some("me"), Some("a/b@c:d%?é")));
        assert_eq!(authority.hosts, [("a", 1), ("b", 2)]);
        assert_eq!(url.options().collect::<Vec<_>>(), [("tls", "on")]);
        // For whom?
        assert!(secret.put_into("kafka://a:1").is_err());
        assert!(secret.put_into("kafka://me:other@a:1").is_err());
        // What is written in its place is not repeated.
        assert!("s3cret".parse::<Secret>().is_err_and(|said| !said.contains("s3cret")));
        std::fs::write(&file, "\n").unwrap();
        assert!(secret.read().is_err());
    }
}
