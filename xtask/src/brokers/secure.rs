//! Brokers that speak nothing but TLS, and the certificates for it, each from an authority made for one test.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

use super::recipe::{Launch, PASSWORD};
use super::{Kind, Result};

/// What a broker needs to speak TLS.
#[derive(Debug, Clone)]
pub struct Secure {
    /// Who it is.
    pub shows: Pair,
    /// The authority that its clients' certificates are of, where it asks for them.
    pub asks_for: Option<PathBuf>,
}

/// Files (PEM) of a certificate and its key.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Pair {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// An authority of its own.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
    /// The file (PEM) that those who trust it name.
    pub ca: PathBuf,
}

fn text(error: rcgen::Error) -> String {
    error.to_string()
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))
}

impl Authority {
    /// Makes one, with its files in a folder that is there.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(folder: &Path, name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().map_err(text)?;
        let ca = folder.join(format!("{name}.pem"));
        write(&ca, &params.self_signed(&key).map_err(text)?.pem())?;
        Ok(Self { issuer: Issuer::new(params, key), folder: folder.to_owned(), ca })
    }

    /// Makes a certificate for hosts and addresses, which ended long ago if it is expired.
    ///
    /// # Errors
    /// A name that is no host, and what the system says.
    pub fn sign(&self, name: &str, hosts: &[&str], is_expired: bool) -> Result<Pair> {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).map_err(text)?;
        params.distinguished_name.push(DnType::CommonName, name);
        if is_expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().map_err(text)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(text)?;
        let place = |end: &str| self.folder.join(format!("{name}.{end}.pem"));
        let pair = Pair { cert: place("cert"), key: place("key") };
        write(&pair.cert, &certificate.pem())?;
        write(&pair.key, &key.serialize_pem())?;
        Ok(pair)
    }
}

/// Changes a broker that is prepared, and was not started yet.
pub(super) fn apply(kind: Kind, launch: &mut Launch, folder: &Path, secure: &Secure) -> Result<()> {
    // Copies: the broker may run as another user, and some insist on who may read a key.
    let copy = |from: &Path, name: &str| -> Result<String> {
        let to = folder.join(name);
        let told = |error: std::io::Error| format!("{}: {error}", to.display());
        fs::copy(from, &to).map_err(told)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).map_err(told)?;
        chown(&to, launch.user, None).map_err(told)?;
        Ok(to.display().to_string())
    };
    let cert = copy(&secure.shows.cert, "tls.cert")?;
    let key = copy(&secure.shows.key, "tls.key")?;
    let ca = copy(secure.asks_for.as_ref().unwrap_or(&secure.shows.cert), "tls.ca")?;
    let (asks, port) = (secure.asks_for.is_some(), launch.port);
    let mut argue = |arguments: &[&str]| {
        launch.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    };
    match kind {
        Kind::Postgres => {
            let settings = [
                "ssl=on",
                &format!("ssl_cert_file={cert}"),
                &format!("ssl_key_file={key}"),
                &format!("ssl_ca_file={ca}"),
            ];
            settings.iter().for_each(|setting| argue(&["-c", setting]));
            let client = if asks { " clientcert=verify-ca" } else { "" };
            write(&folder.join("data/pg_hba.conf"), &format!("hostssl all all all scram-sha-256{client}\n"))?;
        }
        Kind::Redis | Kind::Valkey => {
            let asks = if asks { "yes" } else { "no" };
            argue(&["--port", "0", "--tls-port", &port.to_string(), "--tls-auth-clients", asks]);
            argue(&["--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-ca-cert-file", &ca]);
        }
        Kind::Nats => {
            argue(&["--tls", "--tlscert", &cert, "--tlskey", &key]);
            if asks {
                argue(&["--tlsverify", "--tlscacert", &ca]);
            }
        }
        Kind::Kafka => {
            let both = folder.join("tls.both").display().to_string();
            let read = |file: &str| fs::read_to_string(file).map_err(|error| format!("{file}: {error}"));
            write(Path::new(&both), &(read(&key)? + &read(&cert)?))?;
            kafka(folder, &both, asks.then_some(&ca))?;
        }
        Kind::Rabbitmq => {
            let place = folder.join("rabbitmq.conf");
            let plain =
                fs::read_to_string(&place).map_err(|error| format!("{}: {error}", place.display()))?;
            let (verify, fail) = if asks { ("verify_peer", "true") } else { ("verify_none", "false") };
            let secured = format!(
                "{}ssl_options.cacertfile = {ca}\nssl_options.certfile = {cert}\nssl_options.keyfile = {key}\nssl_options.verify = {verify}\nssl_options.fail_if_no_peer_cert = {fail}\n",
                plain.replace("listeners.tcp.default", "listeners.tcp = none\nlisteners.ssl.default"),
            );
            write(&place, &secured)?;
            launch.ready = "started TLS (SSL) listener on 127.0.0.1";
        }
    }
    let scheme = |plain: &str, secured: &str| launch.url.replace(plain, secured);
    launch.url = match kind {
        Kind::Redis | Kind::Valkey => scheme("redis://", "rediss://"),
        Kind::Rabbitmq => scheme("amqp://", "amqps://"),
        Kind::Kafka => scheme("kafka://", &format!("kafka://eventbus:{PASSWORD}@")),
        Kind::Postgres | Kind::Nats => return Ok(()),
    };
    Ok(())
}

/// TLS and passwords for clients, of which `eventbus` was made with those of SCRAM when the data were formatted. The broker
/// has a listener for itself: it would check there that it trusts what it shows.
fn kafka(folder: &Path, both: &str, asks_for: Option<&String>) -> Result<()> {
    let place = folder.join("server.properties");
    let plain = fs::read_to_string(&place).map_err(|error| format!("{}: {error}", place.display()))?;
    let (module, itself) = ("org.apache.kafka.common.security", super::process::free_port()?);
    let listener = format!("INSIDE://127.0.0.1:{itself},SASL_SSL://");
    let mut secured = plain.replace("PLAINTEXT://", &listener);
    secured += &format!(
        "listener.security.protocol.map=SASL_SSL:SASL_SSL,INSIDE:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=INSIDE
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl_ssl.plain.sasl.jaas.config={module}.plain.PlainLoginModule required user_eventbus=\"{PASSWORD}\";
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config={module}.scram.ScramLoginModule required;
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={module}.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location={both}
"
    );
    if let Some(ca) = asks_for {
        // With passwords a broker asks for certificates only where its listener says so (KIP-684).
        secured += &format!(
            "listener.name.sasl_ssl.ssl.client.auth=required\nssl.truststore.type=PEM\nssl.truststore.location={ca}\n"
        );
    }
    write(&place, &secured)
}
