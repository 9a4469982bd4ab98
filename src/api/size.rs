//! Sizes as Kubernetes quantities, exact to the byte.
//!
//! The accepted text is a subset of the API conventions' quantity: a non-negative decimal number with one of the
//! suffixes `k M G T P E` (powers of 1000), `Ki Mi Gi Ti Pi Ei` (powers of 1024), `m` (thousandths: what Kubernetes
//! itself makes of `2.1Gi`) or an exponent `e6`/`E6`. Fractions of a byte round up. A size is zero or at least one
//! byte: `100m` is a slip for `100M`, not a tenth of a byte. `K`, `kb`, `GiB` and the like are no suffixes.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the API server checks before [`Size::bytes`] sees the text.
pub(crate) const PATTERN: &str = r"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([mkMGTPE]|[KMGTPE]i|[eE][0-9]{1,2})?$";

/// Longest accepted text, in characters.
pub(crate) const MAX_LENGTH: usize = 32;

/// A size as it was written, kept as it was written so that larder never rewrites a user's field.
///
/// It decodes from any JSON value: a bad one that an older schema let in must not make its object undecodable.
/// [`Size::bytes`] judges it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Size(Value);

/// A text that is not a size, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value} is not a size: {why}")]
pub struct InvalidSize {
    value: String,
    why: &'static str,
}

impl Size {
    /// The size in bytes, less than 2^63 - 1, which is where the API server's arithmetic stops.
    ///
    /// # Errors
    /// When the text is not a quantity as the module describes, is between zero and one byte, or is too large.
    pub fn bytes(&self) -> Result<u64, InvalidSize> {
        let text = match &self.0 {
            Value::String(text) => Cow::Borrowed(text.as_str()),
            // As the API server has it: a number with a fraction is written as a text.
            Value::Number(number) if !number.is_f64() => Cow::Owned(number.to_string()),
            other => {
                return Err(invalid(
                    &other.to_string(),
                    "expected a whole number or a text such as 10Gi",
                ));
            }
        };
        parse(&text).map_err(|why| invalid(&text, why))
    }
}

impl From<&str> for Size {
    fn from(text: &str) -> Self {
        Self(Value::String(text.to_owned()))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Value::String(text) => f.write_str(text),
            other => write!(f, "{other}"),
        }
    }
}

fn invalid(value: &str, why: &'static str) -> InvalidSize {
    InvalidSize {
        value: format!("{:?}", value.chars().take(64).collect::<String>()),
        why,
    }
}

/// Reads a size from a command line or a configuration file by the same rules.
///
/// # Errors
/// As [`Size::bytes`].
pub fn parse_size(text: &str) -> Result<u64, InvalidSize> {
    Size::from(text).bytes()
}

fn parse(text: &str) -> Result<u64, &'static str> {
    const FORM: &str = "expected a number with an optional suffix k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi or Ei";
    const LARGE: &str = "it is not less than 9223372036854775807 bytes";
    if text.len() > MAX_LENGTH {
        return Err("it is longer than 32 characters");
    }
    let unsigned = text.strip_prefix('+').unwrap_or(text);
    let end = unsigned
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return Err(FORM);
    }
    let (base, power, thousandths): (u128, u32, bool) = match suffix {
        "" => (10, 0, false),
        "m" => (10, 0, true),
        "k" => (10, 3, false),
        "M" => (10, 6, false),
        "G" => (10, 9, false),
        "T" => (10, 12, false),
        "P" => (10, 15, false),
        "E" => (10, 18, false),
        "Ki" => (2, 10, false),
        "Mi" => (2, 20, false),
        "Gi" => (2, 30, false),
        "Ti" => (2, 40, false),
        "Pi" => (2, 50, false),
        "Ei" => (2, 60, false),
        exponent => {
            let digits = exponent.strip_prefix(['e', 'E']).ok_or(FORM)?;
            if digits.is_empty() || digits.len() > 2 || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(FORM);
            }
            (10, digits.parse().map_err(|_| FORM)?, false)
        }
    };
    let fraction = fraction.trim_end_matches('0');
    let mantissa: u128 = match format!("{whole}{fraction}").trim_start_matches('0') {
        "" => 0,
        digits => digits.parse().map_err(|_| LARGE)?,
    };
    if mantissa == 0 {
        return Ok(0);
    }
    let scale = fraction.len() as u32 + if thousandths { 3 } else { 0 };
    // Powers of ten cancel before they are multiplied out, so that a long but small number is not refused.
    let (power, scale) = if base == 10 {
        let common = power.min(scale);
        (power - common, scale - common)
    } else {
        (power, scale)
    };
    let numerator = base
        .checked_pow(power)
        .and_then(|factor| mantissa.checked_mul(factor))
        .ok_or(LARGE)?;
    let denominator = 10u128.checked_pow(scale).ok_or("it has too many digits")?;
    if numerator < denominator {
        return Err("it is less than one byte (m means thousandths; M means millions)");
    }
    u64::try_from(numerator.div_ceil(denominator))
        .ok()
        .filter(|bytes| i64::try_from(*bytes).is_ok_and(|bytes| bytes < i64::MAX))
        .ok_or(LARGE)
}

/// A CEL expression: whether the text of `value` has the form of a size, so that `quantity()` may be asked about it.
///
/// Every rule that asks `isQuantity()` or `quantity()` asks this before. The schema's own pattern is not enough: the API
/// server runs rules on values that the pattern refuses, and on stored ones that no schema checked, and an exponent of
/// many digits keeps its quantity parser busy for minutes
/// (<https://github.com/kubernetes/kubernetes/issues/141166>).
pub(super) fn cel_has_form(value: &str) -> String {
    format!("string({value}).size() <= {MAX_LENGTH} && string({value}).matches(r'{PATTERN}')")
}

/// A CEL expression: whether `value` is zero or at least one byte, and below 2^63 - 1 (the API server's own parser turns
/// everything larger into 2^63 - 1, so that this value may be any of them).
fn cel_is_size(value: &str) -> String {
    let has_form = cel_has_form(value);
    format!(
        "{has_form} && isQuantity(string({value})) && \
         (quantity(string({value})).compareTo(quantity('0')) == 0 || \
         quantity(string({value})).compareTo(quantity('1')) >= 0) && \
         quantity(string({value})).isLessThan(quantity('9223372036854775807'))"
    )
}

impl JsonSchema for Size {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "maxLength": MAX_LENGTH,
            "pattern": PATTERN,
            "x-kubernetes-validations": [{
                "rule": cel_is_size("self"),
                "message": "must be a size of 0 or at least 1 byte and less than 9223372036854775807 bytes, such as \
                            500M or 10Gi (m means thousandths; M means millions)"
            }],
        })
    }
}

/// A size, or a share of the file system in whole percent: `50Gi`, `10%`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SizeOrPercent(Value);

impl From<&str> for SizeOrPercent {
    fn from(text: &str) -> Self {
        Self(Value::String(text.to_owned()))
    }
}

impl SizeOrPercent {
    /// The size in bytes where the whole is `total` bytes; a percentage rounds up.
    ///
    /// # Errors
    /// As [`Size::bytes`]; a percentage must be a whole number from 0 to 100.
    pub fn of(&self, total: u64) -> Result<u64, InvalidSize> {
        let Some(percent) = self.0.as_str().and_then(|text| text.strip_suffix('%')) else {
            return Size(self.0.clone()).bytes();
        };
        match percent.parse::<u8>() {
            Ok(share) if share <= 100 && percent.len() <= 3 && percent.bytes().all(|b| b.is_ascii_digit()) => {
                // At most `total`, so it fits.
                Ok((u128::from(total) * u128::from(share)).div_ceil(100) as u64)
            }
            _ => Err(invalid(
                &format!("{percent}%"),
                "a percentage is a whole number from 0 to 100",
            )),
        }
    }
}

impl JsonSchema for SizeOrPercent {
    fn schema_name() -> Cow<'static, str> {
        "SizeOrPercent".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let size = PATTERN.trim_start_matches('^').trim_end_matches('$');
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "maxLength": MAX_LENGTH,
            "pattern": format!("^((100|[1-9]?[0-9])%|{size})$"),
            "x-kubernetes-validations": [{
                "rule": format!("string(self).endsWith('%') || ({})", cel_is_size("self")),
                "message": "must be a percentage from 0% to 100%, or a size such as 500M or 10Gi"
            }],
        })
    }
}

/// A size for people: three significant digits with a binary suffix, `1.21Gi`.
pub fn human_size(bytes: u64) -> String {
    const SUFFIXES: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    if bytes < 1024 {
        return format!("{bytes}");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut suffix = 0;
    // 999.5 would print as four digits.
    while value >= 999.5 && suffix + 1 < SUFFIXES.len() {
        value /= 1024.0;
        suffix += 1;
    }
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    let number = format!("{value:.decimals$}");
    let short = if decimals > 0 {
        number.trim_end_matches('0').trim_end_matches('.')
    } else {
        &number
    };
    format!("{short}{}", SUFFIXES[suffix])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tables::{ENDLESS_SIZES, NO_SIZES, SIZES};

    #[test]
    fn sizes_are_exact_and_round_up() {
        for (text, bytes) in SIZES {
            assert_eq!(Size::from(text).bytes(), Ok(bytes), "{text}");
        }
        assert_eq!(Size(Value::from(1000)).bytes(), Ok(1000));
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_value() {
        for text in NO_SIZES.into_iter().chain(ENDLESS_SIZES) {
            let error = Size::from(text).bytes().expect_err(text);
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
        for value in [
            Value::Null,
            serde_json::json!({"a": 1}),
            Value::from(-1),
            Value::from(1.5e300),
            Value::Bool(true),
        ] {
            assert!(Size(value.clone()).bytes().is_err(), "{value}");
        }
    }

    #[test]
    fn a_percentage_is_of_the_whole() {
        assert_eq!(SizeOrPercent::from("10%").of(1001), Ok(101));
        assert_eq!(SizeOrPercent::from("100%").of(u64::MAX), Ok(u64::MAX));
        assert_eq!(SizeOrPercent::from("1Ki").of(5), Ok(1024));
        for bad in ["101%", "-1%", "1.5%", "%", "+1%", "0001%"] {
            assert!(SizeOrPercent::from(bad).of(100).is_err(), "{bad}");
        }
    }

    #[test]
    fn people_read_three_digits() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1Ki"),
            (1536, "1.5Ki"),
            (1024 * 1024 - 1, "1Mi"),
            (1_297_080_123, "1.21Gi"),
            (123 << 20, "123Mi"),
            (u64::MAX, "16Ei"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }
}
