//! What transports share of TLS: the files that an address names, and what a failure means.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// The files of TLS that an address names, in PEM. They are read when the transport is opened, and a certificate that is
/// replaced is seen by the next process; NATS reads them again for each connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TlsFiles {
    /// Authorities to trust.
    pub ca: Option<PathBuf>,
    /// The certificate that the client shows, followed by those above it: mutual TLS.
    pub cert: Option<PathBuf>,
    /// The private key of `cert`, not encrypted.
    pub key: Option<PathBuf>,
}

/// What the files hold.
pub(in crate::transport) struct TlsTexts {
    pub(in crate::transport) ca: Option<String>,
    /// Certificates and the key of the first.
    pub(in crate::transport) identity: Option<(String, String)>,
}

impl TlsFiles {
    /// Reads all, so that a file that is missing, or holds something else, is told as that, and not as a broker that is
    /// not there. None may be named where TLS is not spoken: who names an authority believes that it is.
    pub(in crate::transport) fn read(&self, speaks_tls: bool, how: &str) -> Result<TlsTexts> {
        if !speaks_tls && *self != Self::default() {
            return Err(
                Error::config("the address names files of TLS, and does not ask for TLS").with("hint", how)
            );
        }
        let ca = self.ca.as_deref().map(|file| pem(file, "CERTIFICATE")).transpose()?;
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((pem(cert, "CERTIFICATE")?, pem(key, "PRIVATE KEY")?)),
            (None, None) => None,
            _ => return Err(Error::config("a certificate and its key are named together, or neither")),
        };
        Ok(TlsTexts { ca, identity })
    }
}

/// What a file holds of a kind. Nothing else of it: clients tell what they could not read.
fn pem(file: &Path, kind: &str) -> Result<String> {
    let unusable = |problem| Error::config(problem).with("file", file.display());
    let text = std::fs::read_to_string(file)
        .map_err(|error| unusable("a file of TLS cannot be read").caused_by(error))?;
    // A key also says what kind of key it is: "EC PRIVATE KEY".
    let of_kind = format!("{kind}-----");
    let (mut found, mut is_inside) = (String::new(), false);
    for line in text.lines().map(str::trim_end) {
        if line.starts_with("-----BEGIN ENCRYPTED") || line.starts_with("Proc-Type: 4,ENCRYPTED") {
            return Err(unusable("the key is encrypted, and there is no way to give its password"));
        }
        is_inside |= line.starts_with("-----BEGIN ") && line.ends_with(&of_kind);
        if is_inside {
            found.push_str(line);
            found.push('\n');
        }
        is_inside &= !line.starts_with("-----END ");
    }
    if found.is_empty() {
        return Err(unusable("a file of TLS holds no PEM of its kind").with("kind", kind));
    }
    Ok(found)
}

/// True if TLS failed and not the network: a certificate that one of the two does not take, or a peer that speaks
/// something else. To try again soon is in vain.
fn is_refused(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        #[cfg(feature = "postgres")]
        if matches!(error.downcast_ref(), Some(sqlx::Error::Tls(_))) {
            return true;
        }
        // What rustls says is wrapped like this by all that use it.
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::InvalidData) {
            return true;
        }
        // These two tell as their source what is below the error in them, not that error.
        next = if let Some(error) = error.downcast_ref::<io::Error>() {
            error.get_ref().map(|inner| inner as &(dyn StdError + 'static))
        } else if let Some(error) = error.downcast_ref::<Arc<dyn StdError + Send + Sync>>() {
            Some(error.as_ref())
        } else {
            error.source()
        };
    }
    false
}

/// What an error of opening a transport means. Later the same is an outage: what is in hand is tried again.
pub(in crate::transport) fn at_opening(error: Error) -> Error {
    if is_refused(&error) { refused(error) } else { error }
}

/// The error for what the client tells to be a fault of TLS.
pub(in crate::transport) fn refused(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::new(
        ErrorKind::Unauthorized,
        "TLS failed: the broker's certificate is not trusted, or the broker does not take ours, or speaks no TLS",
    )
    .caused_by(error)
}

/// Names rustls a provider of cryptography where the program named none: with two of them in one program, as when another
/// crate brings aws-lc-rs, rustls would panic instead of choosing (rustls 0.23, `CryptoProvider`).
#[cfg(any(feature = "nats", feature = "redis-tls"))]
pub(in crate::transport) fn choose_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Somebody else may have been faster: then there is one.
        drop(rustls::crypto::ring::default_provider().install_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &Path, name: &str, text: &str) -> PathBuf {
        let file = folder.join(name);
        std::fs::write(&file, text).unwrap();
        file
    }

    #[test]
    fn files_that_cannot_be_used_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let lines = "note\n-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\ncanary-secret\n";
        let cert = file(folder.path(), "cert", lines);
        let key = file(folder.path(), "key", "-----BEGIN EC PRIVATE KEY-----\ncanary-secret\n");
        let locked = file(folder.path(), "locked", "-----BEGIN ENCRYPTED PRIVATE KEY-----\ncanary-secret\n");
        let of = |ca: Option<&PathBuf>, cert: Option<&PathBuf>, key: Option<&PathBuf>| TlsFiles {
            ca: ca.cloned(),
            cert: cert.cloned(),
            key: key.cloned(),
        };
        let both = of(Some(&cert), Some(&cert), Some(&key));
        let texts = both.read(true, "").unwrap();
        assert!(texts.identity.is_some());
        let block = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";
        assert_eq!(texts.ca.as_deref(), Some(block));
        assert!(TlsFiles::default().read(false, "").is_ok());
        for (files, speaks_tls, told) in [
            (both, false, "does not ask for TLS"),
            (of(Some(&folder.path().join("missing")), None, None), true, "cannot be read"),
            (of(Some(&key), None, None), true, "no PEM"),
            (of(None, Some(&cert), None), true, "together"),
            (of(None, Some(&cert), Some(&cert)), true, "no PEM"),
            (of(None, Some(&cert), Some(&locked)), true, "encrypted"),
        ] {
            let error = files.read(speaks_tls, "say so").err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(told), "{error}");
            assert!(!format!("{error:?}").contains("canary-secret"), "{error:?}");
        }
    }
}
