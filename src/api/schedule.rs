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
        let cron = parser
            .parse(&with_ends(fields))
            .map_err(|error| bad(error.to_string()))?;
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

/// `5/15` is each 15th from 5 on, as in a CronJob; the parser wants the end named.
fn with_ends(fields: &str) -> String {
    const LAST: [&str; 5] = ["59", "23", "31", "12", "6"];
    let split: Vec<&str> = fields.split(' ').collect();
    if split.len() != LAST.len() {
        return fields.to_owned();
    }
    let item = |item: &str, last: &str| match item.split_once('/') {
        Some((from, step)) if from != "*" && !from.contains('-') => {
            // Sunday has two numbers, and a range begins with the lower one.
            let from = if last == "6" && matches!(from, "7" | "SUN") {
                "0"
            } else {
                from
            };
            format!("{from}-{last}/{step}")
        }
        _ => item.to_owned(),
    };
    let field = |(field, last): (&&str, &str)| {
        let items: Vec<String> = field.split(',').map(|one| item(one, last)).collect();
        items.join(",")
    };
    let whole: Vec<String> = split.iter().zip(LAST).map(field).collect();
    whole.join(" ")
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

    /// The times that a schedule comes due in, from `from` to before `to`.
    fn due_between(expression: &str, zone: &str, from: &str, to: &str) -> Vec<String> {
        let schedule = Schedule::parse(expression, Some(zone)).unwrap();
        let mut time = at(from).checked_sub(jiff::SignedDuration::from_secs(1)).unwrap();
        let mut due = Vec::new();
        while let Some(next) = schedule.next_after(time).filter(|next| *next < at(to)) {
            assert!(next > time, "{expression} in {zone} goes on from {time} to {next}");
            due.push(next.to_string());
            time = next;
        }
        due
    }

    #[test]
    fn a_step_without_an_end_goes_on_to_the_last_value() {
        let (from, to) = ("2026-01-04T00:00:00Z", "2026-02-01T00:00:00Z");
        for (short, long) in [
            ("5/15 * * * *", "5,20,35,50 * * * *"),
            ("0 20/2,3 * * *", "0 3,20,22 * * *"),
            ("0 0 29/2 * *", "0 0 29,31 * *"),
            ("0 0 1 JAN/6 *", "0 0 1 1,7 *"),
            ("0 0 * * 7/3", "0 0 * * 0,3,6"),
            ("0 0 * * SUN/3", "0 0 * * 0,3,6"),
            ("0 0 * * MON/2", "0 0 * * 1,3,5"),
        ] {
            let due = due_between(short, "UTC", from, to);
            assert_eq!(due, due_between(long, "UTC", from, to), "{short}");
            assert!(!due.is_empty() || short.contains("JAN"), "{short}");
        }
        // What goes backwards is none, in a CronJob neither.
        for backwards in ["0 22-4 * * *", "0 0 * * FRI-MON"] {
            let error = Schedule::parse(backwards, None).unwrap_err().to_string();
            assert!(error.contains(backwards), "{error}");
        }
    }

    #[test]
    fn a_time_that_a_clock_change_leaves_out_or_has_twice_comes_due_once() {
        // Berlin went from 2:00 to 3:00 on 29 March 2026, and from 3:00 back to 2:00 on 25 October, both at 1:00 UTC.
        let spring = due_between(
            "30 2 * * *",
            "Europe/Berlin",
            "2026-03-28T00:00:00Z",
            "2026-03-31T00:00:00Z",
        );
        assert_eq!(
            spring,
            ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]
        );
        let autumn = due_between(
            "30 2 * * *",
            "Europe/Berlin",
            "2026-10-24T00:00:00Z",
            "2026-10-27T00:00:00Z",
        );
        assert_eq!(
            autumn,
            ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]
        );
    }

    #[test]
    fn what_comes_each_hour_comes_in_each_hour_of_a_long_and_a_short_day() {
        for (zone, from, to, hours) in [
            ("Europe/Berlin", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z", 23),
            ("Europe/Berlin", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z", 25),
            ("America/New_York", "2026-03-08T05:00:00Z", "2026-03-09T04:00:00Z", 23),
            ("America/New_York", "2026-11-01T04:00:00Z", "2026-11-02T05:00:00Z", 25),
        ] {
            assert_eq!(due_between("@hourly", zone, from, to).len(), hours, "{zone} {from}");
            assert_eq!(
                due_between("*/15 * * * *", zone, from, to).len(),
                4 * hours,
                "{zone} {from}"
            );
        }
    }

    #[test]
    fn a_daily_run_comes_once_a_day_all_year_in_any_zone() {
        // Besides the usual change: one of half an hour, some at midnight, none.
        for zone in [
            "Europe/Berlin",
            "Australia/Lord_Howe",
            "America/Santiago",
            "Africa/Cairo",
            "Asia/Kolkata",
        ] {
            for minutes in (0..24 * 60).step_by(30) {
                let expression = format!("{} {} * * *", minutes % 60, minutes / 60);
                let begin = |year: i16| {
                    let date = jiff::civil::date(year, 1, 1);
                    date.to_zoned(TimeZone::get(zone).unwrap())
                        .unwrap()
                        .timestamp()
                        .to_string()
                };
                let due = due_between(&expression, zone, &begin(2026), &begin(2027));
                assert_eq!(due.len(), 365, "{expression} in {zone}");
            }
        }
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
