//! How bodies are written: one trait, fit for self-describing, schema-bound and generated formats.

mod json;

use bytes::Bytes;

pub use self::json::Json;
use crate::error::Result;

/// Writes and reads messages of type `T`.
///
/// A codec is a type without a value, so that dispatch costs nothing. Formats over serde implement
/// it for every `T: Serialize + DeserializeOwned`, generated ones for their own message trait.
#[diagnostic::on_unimplemented(
    message = "the codec `{Self}` cannot carry `{T}`",
    note = "for JSON, derive serde's Serialize and Deserialize"
)]
pub trait Codec<T> {
    /// The media type written into `datacontenttype`.
    const CONTENT_TYPE: &'static str;

    /// Writes a value.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) for a value that the format cannot hold.
    fn encode(value: &T) -> Result<Bytes>;

    /// Reads a value from untrusted bytes.
    ///
    /// # Errors
    /// [`Undecodable`](crate::ErrorKind::Undecodable), without any of the payload in its text.
    fn decode(body: &Bytes) -> Result<T>;
}
