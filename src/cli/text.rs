//! Bytes, sizes and times as text.

use std::time::SystemTime;

use jiff::Timestamp;

pub use crate::api::human_size;

/// Any bytes as text, without a loss and without a second spelling: a backslash is `\\`, a byte that is no part of
/// UTF-8 is `\xNN`, everything else is itself.
pub fn lossless(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(&chunk.valid().replace('\\', "\\\\"));
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// As [`lossless`], with control characters escaped too: what a terminal may be shown.
pub fn shown(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for char in lossless(bytes).chars() {
        match char.is_control() {
            true => text.extend(char.escape_default()),
            false => text.push(char),
        }
    }
    text
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
