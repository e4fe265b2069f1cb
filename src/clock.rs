//! Time: a clock that setting the wall clock does not move, and the date formats of log and HTTP.

use std::fmt;
use std::fs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The wall clock as Unix time; zero if it is set before 1970.
pub fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The deadline `limit` from now; a limit that overflows ends at once, rather than never.
pub fn after(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or(now)
}

/// Measures what a piece of work takes.
pub struct Stopwatch {
    started: Instant,
    processor: Option<Duration>,
}

impl Stopwatch {
    pub fn start() -> Stopwatch {
        Stopwatch { started: Instant::now(), processor: processor_time() }
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The processor time that rfw and the programs it ran have used since; without /proc, the
    /// elapsed time.
    pub fn processor(&self) -> Duration {
        let used = self.processor.zip(processor_time());
        used.map_or(self.elapsed(), |(before, now)| now.saturating_sub(before))
    }
}

/// The processor time of this process and of its children that have ended.
fn processor_time() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // proc(5): fields 14 to 17, in ticks of 10 ms; field 2 is a name in parentheses.
    let fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).take(4);
    let ticks: u64 = fields.map(|field| field.parse::<u64>().ok()).sum::<Option<u64>>()?;
    Some(Duration::from_millis(ticks.saturating_mul(10)))
}

/// Unix time that does not jump when the wall clock is set: read once, then
/// advanced by the monotonic clock.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    base: Duration,
}

impl Clock {
    /// Smaller jumps of the wall clock are ignored.
    const MIN_JUMP: Duration = Duration::from_secs(2);

    /// Starts at the wall clock's time.
    pub fn start() -> Clock {
        Clock { started: Instant::now(), base: wall() }
    }

    pub fn now(&self) -> Duration {
        self.base.saturating_add(self.started.elapsed())
    }

    pub fn until_next_second(&self) -> Duration {
        let passed = Duration::from_nanos(self.now().subsec_nanos().into());
        Duration::from_secs(1).saturating_sub(passed)
    }

    /// Follows the wall clock if it was set. Returns by how many seconds: the caller must move every
    /// time read from this clock before as far. The rest, up to half a second, is ignored: otherwise,
    /// each jump would move these times a little against the monotonic clock.
    pub fn follow(&mut self, wall: Duration) -> Option<i64> {
        let now = self.now();
        let jump = wall.abs_diff(now);
        if jump < Clock::MIN_JUMP {
            return None;
        }
        let jump = Duration::from_secs(jump.saturating_add(Duration::from_millis(500)).as_secs());
        let seconds = i64::try_from(jump.as_secs()).unwrap_or(i64::MAX);
        let (base, seconds) = match wall > now {
            true => (now.saturating_add(jump), seconds),
            false => (now.saturating_sub(jump), seconds.saturating_neg()),
        };
        *self = Clock { started: Instant::now(), base };
        Some(seconds)
    }
}

/// A moment in UTC.
#[derive(Clone, Copy, Debug)]
pub struct Utc(pub Duration);

const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

impl Utc {
    /// Year, month (1 to 12) and day (1 to 31) of the Gregorian calendar.
    #[allow(
        clippy::arithmetic_side_effects,
        reason = "a day count below 2^48 is far from every bound; no subtraction goes below zero"
    )]
    fn date(self) -> (u64, u64, u64) {
        // Days since 1 March of year 0: leap days then end a year, and 400
        // years have 146,097 days.
        let days = self.0.as_secs() / 86_400 + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        // From March on, every 5 months have 153 days.
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        (400 * era + year + carry, month, day)
    }

    /// Parses the GeneralizedTime of certificates, such as `20261122110315Z` (RFC 5280, 4.1.2.5.2).
    /// `None` if there is no such moment, or it is before 1970.
    #[allow(clippy::arithmetic_side_effects, reason = "all numbers have a few digits")]
    pub fn parse(text: &[u8]) -> Option<Utc> {
        let digits = str::from_utf8(text.strip_suffix(b"Z")?).ok()?;
        if digits.len() != 14 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let digits: u64 = digits.parse().ok()?;
        let pair = |unit: u64| digits / unit % 100;
        let date @ (year, month, day) =
            (digits / 10_000_000_000, pair(100_000_000), pair(1_000_000));
        let time @ (hour, minute, second) = (pair(10_000), pair(100), pair(1));
        // Counted as in `date`, which then also shows whether the day exists.
        let (year, month) =
            if month > 2 { (year, month - 3) } else { (year.max(1) - 1, month + 9) };
        let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day;
        let days = days.checked_sub(719_469)?;
        let utc = Utc(Duration::from_secs(86_400 * days + 3_600 * hour + 60 * minute + second));
        ((utc.date(), utc.time()) == (date, time)).then_some(utc)
    }

    fn time(self) -> (u64, u64, u64) {
        let second = self.0.as_secs() % 86_400;
        (second / 3_600, second / 60 % 60, second % 60)
    }

    /// IMF-fixdate, RFC 9110, 5.6.7: `Sun, 06 Nov 1994 08:49:37 GMT`.
    pub fn http(self) -> impl fmt::Display {
        let ((year, month, day), (hour, minute, second)) = (self.date(), self.time());
        let weekday = DAYS.get((self.0.as_secs() / 86_400 % 7) as usize).unwrap_or(&"");
        let month = MONTHS.get(month.saturating_sub(1) as usize).unwrap_or(&"");
        format!("{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
    }
}

/// RFC 3339 with milliseconds: `2026-11-22T11:03:15.123Z`.
impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((year, month, day), (hour, minute, second)) = (self.date(), self.time());
        let milli = self.0.subsec_millis();
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        // Checked with: date -u -d @SECONDS
        let table = [
            (0, "1970-01-01T00:00:00.000Z", "Thu, 01 Jan 1970 00:00:00 GMT"),
            (784_111_777, "1994-11-06T08:49:37.000Z", "Sun, 06 Nov 1994 08:49:37 GMT"),
            (951_782_399, "2000-02-28T23:59:59.000Z", "Mon, 28 Feb 2000 23:59:59 GMT"),
            (951_782_400, "2000-02-29T00:00:00.000Z", "Tue, 29 Feb 2000 00:00:00 GMT"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z", "Thu, 29 Feb 2024 23:59:59 GMT"),
            (1_767_225_599, "2025-12-31T23:59:59.000Z", "Wed, 31 Dec 2025 23:59:59 GMT"),
            (1_795_431_795, "2026-11-23T11:03:15.000Z", "Mon, 23 Nov 2026 11:03:15 GMT"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z", "Mon, 01 Mar 2100 00:00:00 GMT"),
        ];
        for (seconds, log, http) in table {
            let utc = Utc(Duration::from_secs(seconds));
            assert_eq!((utc.to_string().as_str(), utc.http().to_string().as_str()), (log, http));
            let digits: String = log[..19].chars().filter(char::is_ascii_digit).collect();
            assert_eq!(Utc::parse((digits + "Z").as_bytes()).unwrap().0, utc.0);
        }
        assert!(Utc(Duration::from_millis(7)).to_string().ends_with(":00.007Z"));
    }

    /// Of this clock, not of the wall clock, from which it may differ by a part of a second.
    #[test]
    fn the_next_second() {
        let clock = Clock { started: Instant::now(), base: Duration::from_millis(1_200) };
        let (before, left, after) = (clock.now(), clock.until_next_second(), clock.now());
        let next = Duration::from_secs(before.as_secs() + 1);
        assert!(before + left <= next && next <= after + left, "{before:?} {left:?} {after:?}");
    }

    #[test]
    fn a_clock_that_was_set() {
        let mut clock = Clock::start();
        let at = |clock: &Clock| clock.now().as_secs();
        let before = at(&clock);
        assert_eq!(clock.follow(clock.now() + Duration::from_millis(1_900)), None);
        assert_eq!(clock.follow(clock.now() + Duration::from_secs(3_600)), Some(3_600));
        assert!(at(&clock) - before - 3_600 < 60);
        assert_eq!(clock.follow(clock.now() - Duration::from_secs(7_200)), Some(-7_200));
        let back = clock.follow(Duration::from_secs(5)).unwrap();
        assert!(back < -1_000_000_000 && at(&clock) < 60, "a router that boots in 1970");
    }

    /// Each jump forward moved all expiries a part of a second further than the clock.
    #[test]
    fn a_clock_that_is_set_back_and_forth() {
        let mut clock = Clock::start();
        let (before, mut moved) = (clock.now(), 0);
        for _ in 0..100 {
            moved += clock.follow(clock.now() + Duration::from_millis(3_600)).unwrap();
            moved += clock.follow(clock.now() - Duration::from_millis(3_400)).unwrap();
        }
        let passed = clock.now().as_secs() as i64 - before.as_secs() as i64;
        assert!((passed - moved).abs() < 60, "{passed} {moved}");
    }
}
