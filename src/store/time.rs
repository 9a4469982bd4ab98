//! `SystemTime` as RFC 3339 in JSON: `#[serde(with = "time")]`.

use std::time::SystemTime;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser};

pub fn serialize<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let timestamp = Timestamp::try_from(*time).map_err(ser::Error::custom)?;
    timestamp.serialize(serializer)
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SystemTime, D::Error> {
    let timestamp = Timestamp::deserialize(deserializer)?;
    Ok(SystemTime::from(timestamp))
}
