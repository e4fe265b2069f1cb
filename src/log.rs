//! The only writer of the log.
//!
//! A line that cannot be written is lost and nothing else: no change of the
//! firewall waits for the log or fails with it.

use crate::clock::{self, Utc};
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;

/// How much an event matters, from least to most.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    Debug,
    Info,
    Warning,
    Error,
    Critical,
}

impl Level {
    const ALL: [(Level, &str); 5] = [
        (Level::Debug, "DEBUG"),
        (Level::Info, "INFO"),
        (Level::Warning, "WARNING"),
        (Level::Error, "ERROR"),
        (Level::Critical, "CRITICAL"),
    ];

    fn name(self) -> &'static str {
        Level::ALL.iter().find(|(level, _)| *level == self).map_or("", |(_, name)| name)
    }

    /// Reads a name, in any letter case.
    pub fn parse(text: &str) -> Option<Level> {
        Level::ALL.iter().find(|(_, name)| name.eq_ignore_ascii_case(text)).map(|(level, _)| *level)
    }
}

/// Where the lines go. Each is one `write` to a file opened for appending, so
/// lines of several threads never mix and nothing needs a lock.
pub struct Log {
    /// The log file and the least level that goes there.
    pub file: Option<(File, Level)>,
    /// The least level that goes to standard error.
    pub stderr: Option<Level>,
}

impl Log {
    /// Writes one event. The text is ours; what clients sent in it must have
    /// gone through [`printable`].
    pub fn write(&self, level: Level, event: fmt::Arguments<'_>) {
        let file = self.file.as_ref().filter(|(_, least)| level >= *least);
        let stderr = self.stderr.filter(|least| level >= *least);
        if file.is_none() && stderr.is_none() {
            return;
        }
        let mut line = String::new();
        let _ = writeln!(line, "{} {} {event}", Utc(clock::wall()), level.name());
        if let Some((mut file, _)) = file.map(|(file, least)| (file, least)) {
            let _ = file.write_all(line.as_bytes());
        }
        if stderr.is_some() {
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    pub fn info(&self, event: fmt::Arguments<'_>) {
        self.write(Level::Info, event);
    }

    pub fn warning(&self, event: fmt::Arguments<'_>) {
        self.write(Level::Warning, event);
    }

    pub fn error(&self, event: fmt::Arguments<'_>) {
        self.write(Level::Error, event);
    }
}

/// Foreign text for a line of the log: everything but printable ASCII is
/// escaped, and so are quotes, so it cannot end a line or a quotation.
pub fn printable(text: &[u8]) -> impl fmt::Display + '_ {
    text.escape_ascii()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_stays_on_its_line() {
        let table: [(&[u8], &str); 4] = [
            (b"PUT /drop", "PUT /drop"),
            (b"a\r\n2026-11-22 INFO forged", r"a\r\n2026-11-22 INFO forged"),
            (b"\"\\\x1b[2J\x00", r#"\"\\\x1b[2J\x00"#),
            ("é".as_bytes(), r"\xc3\xa9"),
        ];
        for (text, shown) in table {
            assert_eq!(printable(text).to_string(), shown);
        }
    }

    #[test]
    fn levels_are_ordered() {
        assert!(Level::parse("debug").unwrap() < Level::parse("INFO").unwrap());
        assert!(Level::Error < Level::Critical);
        assert_eq!(Level::parse("WARN"), None);
    }
}
