//! Durations as people write them: `30d`, `2w`, `12h`, `1h30m`, `90s`; larger units first, each at most once.
//! A week is seven days and a day 24 hours, whatever the clocks do.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration as StdDuration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

const PATTERN: &str = "^([0-9]{1,5}w)?([0-9]{1,5}d)?([0-9]{1,6}h)?([0-9]{1,7}m)?([0-9]{1,8}s)?$";

/// A unit's letter, its length in seconds and its largest number of digits, which keeps the sum far from overflow.
const UNITS: [(char, u64, usize); 5] = [
    ('w', 604_800, 5),
    ('d', 86_400, 5),
    ('h', 3_600, 6),
    ('m', 60, 7),
    ('s', 1, 8),
];

/// A duration as it was written. Like a [`super::Size`] it decodes from any JSON value and is judged when it is used.
/// Its schema refuses zero; [`DurationOrZero`] allows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Duration(Value);

/// A duration that may be `0s`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DurationOrZero(Value);

/// A text that is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a duration: expected a text such as 30d, 12h or 1h30m{1}")]
pub struct InvalidDuration(String, &'static str);

fn parse(value: &Value) -> Result<StdDuration, InvalidDuration> {
    let invalid = || InvalidDuration(value.to_string().chars().take(64).collect(), "");
    let mut rest = value.as_str().filter(|text| !text.is_empty()).ok_or_else(invalid)?;
    let mut seconds = 0;
    for (letter, length, max_digits) in UNITS {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits > 0 && digits <= max_digits && rest[digits..].starts_with(letter) {
            seconds += rest[..digits].parse::<u64>().map_err(|_| invalid())? * length;
            rest = &rest[digits + 1..];
        }
    }
    if rest.is_empty() {
        Ok(StdDuration::from_secs(seconds))
    } else {
        Err(invalid())
    }
}

impl Duration {
    /// The duration, longer than zero.
    ///
    /// # Errors
    /// When the text is none, or zero.
    pub fn get(&self) -> Result<StdDuration, InvalidDuration> {
        match parse(&self.0)? {
            StdDuration::ZERO => Err(InvalidDuration(self.0.to_string(), ", longer than zero")),
            duration => Ok(duration),
        }
    }
}

impl DurationOrZero {
    /// The duration.
    ///
    /// # Errors
    /// When the text is none.
    pub fn get(&self) -> Result<StdDuration, InvalidDuration> {
        parse(&self.0)
    }
}

/// Reads a duration from a command line by the same rules; zero is allowed.
///
/// # Errors
/// When the text is none.
pub fn parse_duration(text: &str) -> Result<StdDuration, InvalidDuration> {
    parse(&Value::from(text))
}

macro_rules! texts {
    ($name:ident, $rules:expr) => {
        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(Value::from(text))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match &self.0 {
                    Value::String(text) => f.write_str(text),
                    other => write!(f, "{other}"),
                }
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                let mut schema =
                    json_schema!({"type": "string", "minLength": 2, "maxLength": 36, "pattern": PATTERN});
                let rules: Value = $rules;
                if !rules.is_null() {
                    schema.insert("x-kubernetes-validations".into(), rules);
                }
                schema
            }
        }
    };
}

texts!(
    Duration,
    serde_json::json!([{"rule": "self.matches('[1-9]')", "message": "must be longer than zero"}])
);
texts!(DurationOrZero, Value::Null);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tables::{DURATIONS, NO_DURATIONS};

    #[test]
    fn durations_add_their_parts_up() {
        for (text, seconds) in DURATIONS {
            assert_eq!(
                Duration::from(text).get(),
                Ok(StdDuration::from_secs(seconds)),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_duration_is_refused_with_the_value() {
        for text in NO_DURATIONS {
            let error = Duration::from(text).get().expect_err(text);
            assert!(error.to_string().contains(&Value::from(text).to_string()), "{error}");
            assert!(DurationOrZero::from(text).get().is_err(), "{text}");
        }
        assert!(Duration(Value::from(30)).get().is_err());
    }

    #[test]
    fn zero_is_a_duration_only_where_it_has_a_meaning() {
        assert!(Duration::from("0s").get().is_err());
        assert!(Duration::from("0h0m").get().is_err());
        assert_eq!(DurationOrZero::from("0s").get(), Ok(StdDuration::ZERO));
    }
}
