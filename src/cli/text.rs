//! Bytes, sizes and times as text.

use std::time::SystemTime;

use jiff::Timestamp;

pub use crate::api::human_size;
pub use crate::store::path_text as lossless;

/// As [`lossless`], with control characters escaped too: what a terminal may be shown.
pub fn shown(bytes: &[u8]) -> String {
    printable(&lossless(bytes))
}

/// A text with its control characters escaped.
pub fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for char in text.chars() {
        match char.is_control() {
            true => printable.extend(char.escape_default()),
            false => printable.push(char),
        }
    }
    printable
}

/// The beginning of a digest, enough to name a tree by.
pub fn short(hex: &str) -> &str {
    hex.get(..12).unwrap_or(hex)
}

/// A time in UTC, to the second.
pub fn time(time: SystemTime) -> String {
    match Timestamp::try_from(time) {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        Err(_) => "-".to_owned(),
    }
}

/// A time in UTC as RFC 3339, for JSON.
pub fn rfc3339(time: SystemTime) -> Option<String> {
    Timestamp::try_from(time).ok().map(|time| time.to_string())
}

/// `1 file`, `2 files`.
pub fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_one_text_and_no_two_names_have_the_same() {
        assert_eq!(lossless("ä b\n".as_bytes()), "ä b\n");
        assert_eq!(lossless(b"a\xff\\xff"), "a\\xff\\\\xff");
        assert_eq!(shown(b"a\x1b[31m\n\xff"), "a\\u{1b}[31m\\n\\xff");
    }
}
