//! jq filters over records, in the language of the jq manual, as the crate jaq understands it.

use std::fmt;

use jaq_core::data::JustLut;
use jaq_core::load::{Arena, File, Loader};
use jaq_core::{Compiler, Ctx, Native, Vars, compile, unwrap_valr};
use jaq_json::{Val, read};
use serde_json::Value;

use crate::exit::{Failure, Outcome};

/// A filter that is ready to run.
pub(crate) struct Jq {
    text: String,
    filter: compile::Filter<Native<JustLut<Val>>>,
}

impl Jq {
    /// Compiles a filter.
    ///
    /// # Errors
    /// Usage: it is none, or calls what does not exist.
    pub(crate) fn compile(text: &str) -> Outcome<Self> {
        let wrong = |what: &str| Failure::Usage(format!("not a jq filter: {text}: {what}"));
        let defs = jaq_core::defs().chain(jaq_std::defs()).chain(jaq_json::defs());
        let funs = jaq_core::funs().chain(jaq_std::funs()).chain(jaq_json::funs());
        let arena = Arena::default();
        let modules = Loader::new(defs)
            .load(&arena, File { code: text, path: () })
            .map_err(|_| wrong("it cannot be read"))?;
        let filter = Compiler::default().with_funs(funs).compile(modules).map_err(|errors| {
            let names = errors.iter().flat_map(|(_, unknown)| unknown).map(|(name, _)| (*name).to_owned());
            wrong(&format!("unknown: {}", names.collect::<Vec<_>>().join(", ")))
        })?;
        Ok(Self { text: text.to_owned(), filter })
    }

    /// Returns all that the filter makes of a value.
    ///
    /// # Errors
    /// Usage: the filter fails on this value, as `.a + 1` does where `.a` is a text.
    pub(crate) fn all(&self, value: &Value) -> Outcome<Vec<Value>> {
        let wrong = |what: &dyn fmt::Display| Failure::Usage(format!("jq {}: {what}", self.text));
        let input = read::parse_single(value.to_string().as_bytes()).map_err(|error| wrong(&error))?;
        let context = Ctx::<JustLut<Val>>::new(&self.filter.lut, Vars::new([]));
        let outputs = self.filter.id.run((context, input)).map(unwrap_valr);
        outputs
            .map(|output| {
                let text = output.map_err(|error| wrong(&error))?.to_string();
                serde_json::from_str(&text).map_err(|error| wrong(&error))
            })
            .collect()
    }

    /// Whether the first that the filter makes of a value is true: neither null nor false.
    ///
    /// # Errors
    /// As [`all`](Self::all).
    pub(crate) fn holds(&self, value: &Value) -> Outcome<bool> {
        Ok(!matches!(self.all(value)?.first(), None | Some(Value::Null | Value::Bool(false))))
    }

    /// Returns the one value that the filter makes of another.
    ///
    /// # Errors
    /// As [`all`](Self::all), or it makes none or several.
    pub(crate) fn one(&self, value: &Value) -> Outcome<Value> {
        match self.all(value)?.as_mut_slice() {
            [one] => Ok(one.take()),
            several => {
                Err(Failure::Usage(format!("jq {}: it makes {} values of one", self.text, several.len())))
            }
        }
    }
}

impl fmt::Debug for Jq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Jq").field(&self.text).finish()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn filters_hold_select_and_say_why_not() {
        let record = json!({"value": {"data": {"amount": 7, "items": ["a", "b"]}}, "key": null});
        for (filter, holds) in [
            (".value.data.amount > 5", true),
            (".value.data.amount > 7", false),
            (".key", false),
            ("empty", false),
            (".value.data.items | any(. == \"b\")", true),
            (".missing.deeply.so", false),
        ] {
            assert_eq!(Jq::compile(filter).unwrap().holds(&record).unwrap(), holds, "{filter}");
        }
        let items = Jq::compile(".value.data.items[]").unwrap();
        assert_eq!(items.all(&record).unwrap(), [json!("a"), json!("b")]);
        assert!(matches!(items.one(&record), Err(Failure::Usage(_))));
        let edited = Jq::compile(".value.data.amount += 1").unwrap().one(&record).unwrap();
        assert_eq!(edited["value"]["data"]["amount"], 8);
        for bad in [".a[", "nonsense(1)", "$unbound"] {
            assert!(matches!(Jq::compile(bad), Err(Failure::Usage(_))), "{bad}");
        }
        let fails = Jq::compile(".value.data.items + 1").unwrap().holds(&record).unwrap_err();
        assert!(fails.to_string().contains("items + 1"), "{fails}");
    }
}
