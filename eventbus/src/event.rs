//! Typed messages: the wire name and version that a type carries, chosen by its author.

use bytes::Bytes;

use crate::codec::Codec;
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Key;
use crate::text::Text;

/// A type that travels as the body of an [`Envelope`]; derived by `Event` and `Command`.
pub trait Message: Sized + Send + Sync + 'static {
    /// The wire name, such as `shop.order.placed`; never a Rust path.
    const TYPE: &'static str;
    /// The version of the body's shape, from 1.
    const VERSION: u32;
    /// Whether it is a [`Command`], which has one owner.
    const IS_COMMAND: bool = false;
    /// How the body is written.
    type Codec: Codec<Self>;

    /// Returns the key that orders this message, if it has one.
    fn key(&self) -> Option<Key>;
}

/// A notification that something happened: published to a topic, seen by any number of groups.
///
/// ```
/// # use eventbus::{Event, Message};
/// # use serde::{Serialize, Deserialize};
/// #[derive(Event, Serialize, Deserialize)]
/// #[event(type = "shop.order.placed", version = 1, key = order_id)]
/// struct OrderPlaced { order_id: u64, sku: String }
///
/// assert_eq!(OrderPlaced::TYPE, "shop.order.placed");
/// assert_eq!(OrderPlaced { order_id: 7, sku: "a".into() }.key(), Some("7".into()));
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    note = "derive it: #[derive(Event)] #[event(type = \"…\", version = 1)]"
)]
pub trait Event: Message {}

/// A request to the one owner that handles it, which may be answered.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a command",
    note = "derive it: #[derive(Command)] #[command(type = \"…\", version = 1, reply = Answer)]"
)]
pub trait Command: Message {
    /// The answer; `()` if there is none.
    type Reply: Message;
}

/// The answer to a command that has none.
impl Message for () {
    const TYPE: &'static str = "evt.done";
    const VERSION: u32 = 1;
    type Codec = crate::codec::Json;

    fn key(&self) -> Option<Key> {
        None
    }
}

/// Conversion between messages and envelopes.
impl Envelope {
    /// Wraps a message: its type, version, key, content type and encoded body.
    ///
    /// # Errors
    /// Permanent if the codec cannot write the value.
    pub fn of<M: Message>(message: &M, source: impl Into<Text>) -> Result<Self> {
        let body: Bytes = M::Codec::encode(message)?;
        let envelope = Self::new(M::TYPE, source)
            .with_version(M::VERSION)
            .with_content_type(M::Codec::CONTENT_TYPE)
            .with_payload(body);
        Ok(match message.key() {
            Some(key) => envelope.with_key(key),
            None => envelope,
        })
    }

    /// Reads the body as a message of exactly this type and version. A missing version counts as 1.
    ///
    /// # Errors
    /// [`UnknownType`](ErrorKind::UnknownType) for another type or version;
    /// [`Undecodable`](ErrorKind::Undecodable) for a body that does not decode, or an absent one.
    pub fn decode<M: Message>(&self) -> Result<M> {
        if self.event_type() != M::TYPE || self.version().unwrap_or(1) != M::VERSION {
            return Err(Error::new(ErrorKind::UnknownType, "another type or version was expected")
                .with("expected", format_args!("{} v{}", M::TYPE, M::VERSION))
                .with("found", format_args!("{} v{}", self.event_type(), self.version().unwrap_or(1))));
        }
        let body = self
            .payload()
            .ok_or_else(|| Error::new(ErrorKind::Undecodable, "the body is absent").with("type", M::TYPE))?;
        M::Codec::decode(body).map_err(|error| error.with("type", M::TYPE))
    }
}
