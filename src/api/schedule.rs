//! When retention runs: a five-field cron expression or `@hourly @daily @weekly @monthly`, in a named time zone.

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// A schedule that is known to be good.
#[derive(Debug, Clone)]
pub struct Schedule {
    cron: Cron,
    zone: TimeZone,
}

/// What is wrong with a schedule or its time zone, with the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSchedule {
    #[error("schedule {0:?} cannot be used: {1}")]
    Expression(String, String),
    #[error("timeZone {0:?} is not a zone of the IANA time zone database, such as Europe/Berlin")]
    Zone(String),
}

impl Schedule {
    /// Reads an expression and a zone; no zone is UTC.
    ///
    /// # Errors
    /// When the expression has not five fields or a value out of range, or never comes due; when the zone is unknown.
    pub fn parse(expression: &str, zone: Option<&str>) -> Result<Self, InvalidSchedule> {
        let bad = |why: String| InvalidSchedule::Expression(expression.to_owned(), why);
        let fields = match expression {
            "@hourly" => "0 * * * *",
            "@daily" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            other => other,
        };
        let parser = CronParser::builder()
            .seconds(Seconds::Disallowed)
            .year(Year::Disallowed)
            .build();
        let cron = parser.parse(fields).map_err(|error| bad(error.to_string()))?;
        let zone = match zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|_| InvalidSchedule::Zone(name.to_owned()))?,
        };
        let schedule = Self { cron, zone };
        if schedule.next_after(Timestamp::UNIX_EPOCH).is_none() {
            return Err(bad("it never comes due".to_owned()));
        }
        Ok(schedule)
    }

    /// The first time after `time` at which a run is due.
    pub fn next_after(&self, time: Timestamp) -> Option<Timestamp> {
        let local = time.to_zoned(self.zone.clone());
        self.cron
            .find_next_occurrence(&local, false)
            .ok()
            .map(|due| due.timestamp())
    }
}

/// The CRD's pattern: field by field with the ranges of each, so that the API server refuses a bad one.
pub(crate) fn pattern() -> String {
    let field = |value: &str| {
        let item = format!("(\\*|{value}(-{value})?)(/[1-9][0-9]?)?");
        format!("{item}(,{item})*")
    };
    let minute = field("([0-9]|[1-5][0-9])");
    let hour = field("([0-9]|1[0-9]|2[0-3])");
    let day = field("([1-9]|[12][0-9]|3[01])");
    let month = field("([1-9]|1[0-2]|JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)");
    let weekday = field("([0-7]|SUN|MON|TUE|WED|THU|FRI|SAT)");
    format!("^(@(hourly|daily|weekly|monthly)|{minute} {hour} {day} {month} {weekday})$")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_schedule_comes_due_in_its_zone() {
        let schedule = Schedule::parse("0 3 * * *", Some("Europe/Berlin")).unwrap();
        assert_eq!(
            schedule.next_after(at("2026-01-10T12:00:00Z")),
            Some(at("2026-01-11T02:00:00Z"))
        );
        assert_eq!(
            schedule.next_after(at("2026-07-10T12:00:00Z")),
            Some(at("2026-07-11T01:00:00Z"))
        );
        let daily = Schedule::parse("@daily", None).unwrap();
        assert_eq!(
            daily.next_after(at("2026-01-10T00:00:00Z")),
            Some(at("2026-01-11T00:00:00Z"))
        );
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for bad in [
            "",
            "* * * *",
            "0 0 3 * * *",
            "61 * * * *",
            "x * * * *",
            "0 0 30 2 *",
            "@yearlyish",
        ] {
            let error = Schedule::parse(bad, None).expect_err(bad);
            assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
        }
        let error = Schedule::parse("@daily", Some("Mars/Base")).unwrap_err();
        assert!(error.to_string().contains("Mars/Base"));
    }
}
