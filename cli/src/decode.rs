//! How bodies are shown: as they are, as bytes, or through a program that knows their form.

use std::io::Write;
use std::process::{Command, Stdio};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::record;

/// What bodies are taken for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// JSON, else text, else base64.
    #[default]
    Auto,
    /// Text, else base64.
    Raw,
    /// JSON; what is none says so in its decode_error.
    Json,
    /// Two hexadecimal digits a byte.
    Hex,
}

/// Flags of how bodies are shown.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Decode {
    /// What bodies are taken for.
    #[arg(long = "decode", value_enum, default_value = "auto", value_name = "FORM")]
    form: Form,
    /// Shows what this shell's command writes when it reads the body, such as 'protoc --decode shop.Order order.proto'.
    /// A failure is in the record's decode_error. --where sees bodies as they are.
    #[arg(long = "decode-with", value_name = "CMD")]
    command: Option<String>,
}

/// A body as it is shown.
pub(crate) struct Shown {
    form: Form,
    bytes: Bytes,
    /// It is longer than it is shown.
    pub is_cut: bool,
    /// Why it is not what it was taken for.
    pub error: Option<String>,
}

impl Decode {
    /// Whether no body is taken for JSON.
    pub(crate) fn is_as_it_is(&self) -> bool {
        matches!(self.form, Form::Raw | Form::Hex)
    }

    /// Decodes a body and cuts what comes of it.
    pub(crate) fn show(&self, body: &Bytes, max_bytes: usize) -> Shown {
        let (bytes, mut error) = match self.command.as_deref().map(|command| through(command, body)) {
            None => (body.clone(), None),
            Some(Ok(decoded)) => (Bytes::from(decoded), None),
            Some(Err(why)) => (body.clone(), Some(why)),
        };
        if self.form == Form::Json && error.is_none() {
            let read = serde_json::from_slice::<serde::de::IgnoredAny>(&bytes);
            error = read.err().map(|why| format!("not JSON: {why}"));
        }
        let n_shown = bytes.len().min(max_bytes);
        Shown { form: self.form, is_cut: n_shown < bytes.len(), bytes: bytes.slice(..n_shown), error }
    }
}

impl Shown {
    /// As the value of a record.
    pub(crate) fn value(&self) -> Value {
        match self.form {
            Form::Auto | Form::Json => record::body(&self.bytes),
            Form::Raw => {
                let (data, enc) = record::coded(&self.bytes);
                json!({"enc": enc, "data": data})
            }
            Form::Hex => json!({"enc": "hex", "data": hex(&self.bytes)}),
        }
    }

    /// As text for people.
    pub(crate) fn text(&self) -> String {
        let text = match self.form {
            Form::Hex => hex(&self.bytes),
            _ => String::from_utf8_lossy(&self.bytes).into_owned(),
        };
        match &self.error {
            Some(why) => format!("{text} ({why})"),
            None => text,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that hexadecimal digits stand for.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.as_bytes().chunks(2).map(|pair| digits(pair).filter(|_| pair.len() == 2)).collect()
}

/// What a shell's command makes of a body.
fn through(command: &str, body: &[u8]) -> Result<Vec<u8>, String> {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = shell.spawn().map_err(|error| error.to_string())?;
    let input = child.stdin.take();
    std::thread::scope(|scope| {
        // Beside its output, which it may begin before it has read all. One that reads no more has its reasons.
        scope.spawn(move || input.and_then(|mut input| input.write_all(body).ok()));
        let done = child.wait_with_output().map_err(|error| error.to_string())?;
        if done.status.success() {
            return Ok(done.stdout);
        }
        let said = String::from_utf8_lossy(&done.stderr);
        Err(format!("{}: {}", done.status, said.lines().next().unwrap_or_default()))
    })
}
