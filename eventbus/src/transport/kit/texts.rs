//! Attribute texts of many events, shared.

use crate::text::Text;

/// Attribute texts seen in one read: neighbours mostly share source, type and content type.
#[derive(Default)]
pub(crate) struct Texts(Vec<Text>);

impl Texts {
    /// The text, as one that was seen before where it was.
    pub(crate) fn share(&mut self, text: &str) -> Text {
        if let Some(known) = self.0.iter().find(|known| &***known == text) {
            return known.clone();
        }
        let text = Text::from(text.to_owned());
        if self.0.len() < 8 {
            self.0.push(text.clone());
        }
        text
    }
}
