//! A list of addresses, parsed line by line as its bytes arrive.
//!
//! ```text
//! list  = [ byte-order-mark ] *( line ( LF / CR LF / CR ) ) [ line ]
//! line  = *WSP [ entry ] *WSP [ ( "#" / ";" / "//" ) comment ]
//! entry = address [ "/" prefix ] / address *WSP "-" *WSP address
//! ```

use super::net::{Family, Net};
use super::whitelist::{Permitted, Sieve};
use super::{Chain, RuleError, is_narrow, take_block};

/// The most blocks in a list; a range counts as the blocks that make it up.
pub const MAX_ENTRIES: usize = 1_000_000;
/// The longest line in bytes, without its comment.
pub const MAX_LINE: usize = 1024;
/// How many invalid lines, and how many whitelisted ones, are reported.
const MAX_REPORTED: usize = 20;
/// In UTF-8; some editors and spreadsheets write it.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListOptions {
    /// Whether invalid lines are skipped, if they are at most half of all.
    pub lenient: bool,
    /// Whether this host filters IPv6; if not, IPv6 lines are skipped.
    pub ipv6: bool,
}

/// A list that is being parsed.
pub struct List {
    options: ListOptions,
    sieve: Sieve,
    /// The first block of each line with holes.
    cut: Vec<Net>,
    report: ListReport,
    invalid: Invalid,
    /// Lines so far, including those without an entry.
    lines: usize,
    /// The line that is not yet complete, cut soon after [`MAX_LINE`].
    line: Vec<u8>,
    after_cr: bool,
}

/// The invalid lines of a list.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Invalid {
    pub count: usize,
    /// How many lines have an entry, valid or not.
    pub entries: usize,
    /// The first of them, with their numbers, counted from 1.
    pub lines: Vec<(usize, RuleError)>,
}

/// The parts of a list that are not applied.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct ListReport {
    /// How many lines name protected addresses. The rest of such a line is applied.
    pub whitelisted_count: usize,
    /// The first of them.
    pub whitelisted: Vec<String>,
    /// Lines skipped because this host has no IPv6.
    pub ipv6_skipped: usize,
    /// With `lenient`, the lines skipped as invalid.
    pub invalid: Option<Invalid>,
}

/// Why a list is refused as a whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ListError {
    /// More than [`MAX_ENTRIES`] blocks.
    TooMany,
    /// No address.
    Empty,
    Invalid(Invalid),
}

impl List {
    pub fn new(sieve: Sieve, options: ListOptions) -> List {
        List {
            options,
            sieve,
            cut: Vec::new(),
            report: ListReport::default(),
            invalid: Invalid::default(),
            lines: 0,
            line: Vec::new(),
            after_cr: false,
        }
    }

    /// Parses the next bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), ListError> {
        for piece in bytes.split_inclusive(|byte| matches!(byte, b'\r' | b'\n')) {
            let after_cr = std::mem::replace(&mut self.after_cr, piece.ends_with(b"\r"));
            if after_cr && piece == b"\n" {
                continue; // the second half of CR LF
            }
            let text = piece.strip_suffix(b"\n").or(piece.strip_suffix(b"\r"));
            // Room for the longest entry, and for what shows that it continues or ends there.
            let room = MAX_LINE.saturating_add(BYTE_ORDER_MARK.len()).saturating_add(2);
            let room = room.saturating_sub(self.line.len());
            self.line.extend(text.unwrap_or(piece).iter().take(room));
            if text.is_some() {
                self.end_line()?;
            }
        }
        Ok(())
    }

    /// The permitted change, and the report on what it leaves out.
    pub fn finish(mut self) -> Result<(Permitted, ListReport), ListError> {
        self.end_line()?;
        let Invalid { count, entries, .. } = self.invalid;
        // A failed download must not unblock everything that the previous list blocked.
        let deletes_all = self.sieve.count() == 0 && self.sieve.replaces();
        if entries == 0 || deletes_all && count == 0 {
            return Err(ListError::Empty);
        }
        let tolerated = if self.options.lenient { entries / 2 } else { 0 };
        if count > tolerated || deletes_all {
            return Err(ListError::Invalid(self.invalid));
        }
        self.cut.sort_unstable();
        self.cut.dedup();
        self.report.whitelisted_count = self.cut.len();
        self.report.invalid = self.options.lenient.then_some(self.invalid);
        Ok((self.sieve.permit(), self.report))
    }

    fn end_line(&mut self) -> Result<(), ListError> {
        let mut line = std::mem::take(&mut self.line);
        self.lines = self.lines.saturating_add(1);
        let mark = if self.lines == 1 { BYTE_ORDER_MARK } else { b"" };
        let entry = without_comment(line.strip_prefix(mark).unwrap_or(&line));
        let text = String::from_utf8_lossy(entry);
        let text = text.trim_matches([' ', '\t']);
        if !text.is_empty() || entry.len() > MAX_LINE {
            let blocks = if entry.len() > MAX_LINE { Err(RuleError::Long) } else { blocks(text) };
            self.add_entry(text, blocks)?;
        }
        line.clear();
        self.line = line;
        Ok(())
    }

    fn add_entry(
        &mut self,
        text: &str,
        blocks: Result<Vec<Net>, RuleError>,
    ) -> Result<(), ListError> {
        self.invalid.entries = self.invalid.entries.saturating_add(1);
        let is_ipv6 = |net: &Net| net.family() == Family::V6;
        match blocks {
            Err(error) => {
                self.invalid.count = self.invalid.count.saturating_add(1);
                if self.invalid.lines.len() < MAX_REPORTED {
                    self.invalid.lines.push((self.lines, error));
                }
            }
            Ok(blocks) if !self.options.ipv6 && blocks.iter().any(is_ipv6) => {
                self.report.ipv6_skipped = self.report.ipv6_skipped.saturating_add(1);
            }
            Ok(blocks) => self.add_blocks(text, &blocks),
        }
        match self.sieve.count().saturating_add(self.cut.len()) > MAX_ENTRIES {
            true => Err(ListError::TooMany),
            false => Ok(()),
        }
    }

    fn add_blocks(&mut self, text: &str, blocks: &[Net]) {
        let mut has_holes = false;
        for net in blocks {
            has_holes |= self.sieve.add(*net);
        }
        if has_holes {
            self.cut.extend(blocks.first());
            let text = match blocks {
                [net] => net.to_string(),
                _ => text.into(),
            };
            let reported = &mut self.report.whitelisted;
            if reported.len() < MAX_REPORTED && !reported.contains(&text) {
                reported.push(text);
            }
        }
    }
}

fn without_comment(line: &[u8]) -> &[u8] {
    let sign = line.iter().position(|byte| matches!(byte, b'#' | b';'));
    let slashes = line.windows(2).position(|pair| pair == b"//");
    let end = sign.into_iter().chain(slashes).min();
    end.and_then(|end| line.get(..end)).unwrap_or(line)
}

/// Parses an entry, which may name what the path of a rule in INPUT may name.
fn blocks(entry: &str) -> Result<Vec<Net>, RuleError> {
    if entry.contains('-') {
        let nets = Net::parse_range(entry).filter(|nets| !nets.iter().any(Net::is_unspecified));
        let nets = nets.ok_or_else(|| RuleError::Range(entry.into()))?;
        return match nets.iter().find(|net| !is_narrow(net)) {
            Some(wide) => Err(RuleError::Wide(*wide)),
            None => Ok(nets),
        };
    }
    let segments: Vec<&str> = entry.split('/').collect();
    let mut rest = segments.iter();
    let net = take_block(Chain::Input, &mut rest)?;
    match rest.len() > 0 || net.is_any() {
        true => Err(RuleError::Address(entry.into())),
        false => Ok(vec![net]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::rights::Rights;
    use crate::rule::whitelist::Whitelist;
    use crate::rule::{Action, RuleTemplate, Rules};

    /// The blocks and the report, or the error.
    fn read_with(
        text: &[u8],
        step: usize,
        lenient: bool,
        ipv6: bool,
    ) -> Result<(String, String), String> {
        let whitelist = Whitelist::parse("10.0.0.0/24\n2001:db8::1").unwrap();
        let own = [Net::parse("198.18.0.3").unwrap()];
        let template = RuleTemplate::parse(&["drop", "output", "eth0"]).unwrap();
        let options = ListOptions { lenient, ipv6 };
        let allowed = Rights::admin(Action::Delete);
        let mut list = List::new(Sieve::new(&whitelist, &own, template, allowed), options);
        for bytes in text.chunks(step) {
            list.push(bytes).unwrap();
        }
        let invalid_text = |invalid: &Invalid| {
            let lines = invalid.lines.iter().map(|(line, error)| format!("{line} {error:?}"));
            let lines = lines.collect::<Vec<_>>().join(", ");
            format!("{}/{}: {lines}", invalid.count, invalid.entries)
        };
        let (permitted, report) = list.finish().map_err(|error| match error {
            ListError::Invalid(invalid) => invalid_text(&invalid),
            error => format!("{error:?}"),
        })?;
        let Rules::List(_, nets) = permitted.into_change().rules else { panic!("no list") };
        let nets: Vec<String> = nets.iter().map(Net::to_string).collect();
        let mut text = format!("{}: {}", report.whitelisted_count, report.whitelisted.join(" "));
        if report.ipv6_skipped > 0 {
            text += &format!(" {} skipped", report.ipv6_skipped);
        }
        if let Some(invalid) = &report.invalid {
            text += &format!(" {}", invalid_text(invalid));
        }
        Ok((nets.join(" "), text))
    }

    fn read(text: &str, step: usize) -> Result<(String, String), String> {
        read_with(text.as_bytes(), step, false, true)
    }

    #[test]
    fn lists() {
        let long = format!("1.1.1.1 #{}\n2.2.2.2", "x".repeat(9_999));
        let longest = format!("{}1.1.1.1;", " ".repeat(MAX_LINE - 7));
        let table = [
            ("1.1.1.1", "1.1.1.1", "0: "),
            ("1.1.1.1\r2.2.2.2\r\r3.3.3.3\r", "1.1.1.1 2.2.2.2 3.3.3.3", "0: "),
            ("\u{feff}1.1.1.1//x\n// #\n2.2.2.2/31 // y", "1.1.1.1 2.2.2.2/31", "0: "),
            ("\u{feff}\r\n1.1.1.1/32//", "1.1.1.1", "0: "),
            ("2.2.2.2\n1.1.1.1\r\n", "1.1.1.1 2.2.2.2", "0: "),
            (
                "# feed\n\n ; \n\t7.7.7.77/24 ; SBL1\n2001:DB8::3/126#x",
                "7.7.7.0/24 2001:db8:: 2001:db8::2/127",
                "1: 2001:db8::/126",
            ),
            ("1.1.1.0-1.1.1.2\n1.1.1.2 - 1.1.1.3\n", "1.1.1.0/31 1.1.1.2/31 1.1.1.2", "0: "),
            ("::ffff:1.1.1.1\n1.1.1.1/32\n", "1.1.1.1", "0: "),
            (
                "10.0.0.7\n10.0.0.7/32\n9.255.255.255-10.0.0.0\n",
                "9.255.255.255",
                "2: 10.0.0.7 9.255.255.255-10.0.0.0",
            ),
            ("198.18.0.0/30", "198.18.0.0/31 198.18.0.2", "1: 198.18.0.0/30"),
            ("127.0.0.1\n::1\n128.0.0.0/9\n8000::/17", "128.0.0.0/9 8000::/17", "2: 127.0.0.1 ::1"),
            (&long, "1.1.1.1 2.2.2.2", "0: "),
            (&longest, "1.1.1.1", "0: "),
        ];
        for (text, nets, left_out) in table {
            for step in [1, 7, 100_000] {
                assert_eq!(read(text, step), Ok((nets.into(), left_out.into())), "{text}");
            }
        }
    }

    #[test]
    fn lenient_lists() {
        let table = [
            ("x\n1.1.1.1", "1.1.1.1", r#"0:  1/2: 1 Address("x")"#),
            ("1.1.1.1\n# x\n\n", "1.1.1.1", "0:  0/1: "),
            (
                "x\n1.1.1.1\ny\n10.0.0.1",
                "1.1.1.1",
                r#"1: 10.0.0.1 2/4: 1 Address("x"), 3 Address("y")"#,
            ),
        ];
        for (text, nets, report) in table {
            let read = read_with(text.as_bytes(), 3, true, true);
            assert_eq!(read, Ok((nets.into(), report.into())), "{text}");
        }
        for text in ["x", "x\n1.1.1.1\ny", "x\n#\n#\n#"] {
            let error = read_with(text.as_bytes(), 3, true, true).unwrap_err();
            assert!(error.contains(r#": 1 Address("x")"#), "{error}");
        }
        // Bytes that are not UTF-8 are invalid, except in a comment.
        let read = read_with(b"1.1.1.1 # \xff\n\xff\n", 3, true, true);
        assert_eq!(read.unwrap().1, "0:  1/2: 2 Address(\"\u{fffd}\")");
    }

    #[test]
    fn lists_that_name_no_address() {
        for text in ["", "\n", "\r", "\u{feff}", " \t\r\n# 1.1.1.1\n;\n//1.1.1.1"] {
            for lenient in [false, true] {
                let error = read_with(text.as_bytes(), 1, lenient, true);
                assert_eq!(error, Err("Empty".into()), "{text:?}");
            }
        }
    }

    #[test]
    fn lists_on_a_host_without_ipv6() {
        let text = "1.1.1.1\n::2\n2001:db8::/64\n2001:db8::1-2001:db8::3\n::ffff:2.2.2.2\n";
        let read = |text: &str| read_with(text.as_bytes(), 9, false, false);
        assert_eq!(read(text), Ok(("1.1.1.1 2.2.2.2".into(), "0:  3 skipped".into())));
        assert_eq!(read("::2"), Ok(("".into(), "0:  1 skipped".into())));
        assert!(read("::2\n2000::/9").unwrap_err().starts_with("1/2: 2 Wide"));
    }

    #[test]
    fn invalid_lines() {
        let long = format!("1.1.1.1{}9", " ".repeat(MAX_LINE));
        let wide = |text: &str| format!("{:?}", RuleError::Wide(Net::parse(text).unwrap()));
        let table = [
            ("1.1.1.1\nexample.com\n", r#"1/2: 2 Address("example.com")"#.into()),
            ("1.1.1.1 2.2.2.2", r#"1/1: 1 Address("1.1.1.1 2.2.2.2")"#.into()),
            ("0.0.0.0\r::", r#"2/2: 1 Address("0.0.0.0"), 2 Address("::")"#.into()),
            ("1.0.0.0/8", format!("1/1: 1 {}", wide("1.0.0.0/8"))),
            ("12.0.0.0-13.255.255.255", format!("1/1: 1 {}", wide("12.0.0.0/7"))),
            ("\n1.1.1.1/24/24", r#"1/1: 2 Address("1.1.1.1/24/24")"#.into()),
            ("\r\n\r1.1.1.1/33", r#"1/1: 3 Mask("1.1.1.1/33")"#.into()),
            ("1.1.1.1/ /x", r#"1/1: 1 Mask("1.1.1.1/ ")"#.into()),
            ("1.1.1.1\n\u{feff}2.2.2.2", "1/2: 2 Address(\"\\u{feff}2.2.2.2\")".into()),
            ("2.2.2.2-1.1.1.1", r#"1/1: 1 Range("2.2.2.2-1.1.1.1")"#.into()),
            ("1.1.1.1-::1", r#"1/1: 1 Range("1.1.1.1-::1")"#.into()),
            ("0.0.0.0-1.1.1.1", format!("1/1: 1 {}", wide("0.0.0.0/8"))),
            ("0.0.0.0-0.0.0.0", r#"1/1: 1 Range("0.0.0.0-0.0.0.0")"#.into()),
            ("1.1.1.0/24-1.1.2.0", r#"1/1: 1 Range("1.1.1.0/24-1.1.2.0")"#.into()),
            ("10.0.0.1,", r#"1/1: 1 Address("10.0.0.1,")"#.into()),
            (&long, "1/1: 1 Long".into()),
        ];
        for (text, error) in table {
            assert_eq!(read(text, 5), Err(error), "{text}");
        }
        let many = read(&"x\n".repeat(30), 9).unwrap_err();
        assert!(many.starts_with("30/30: 1 ") && many.ends_with(r#"20 Address("x")"#), "{many}");
        let many: String = (0..30).map(|n| format!("10.0.0.{n}\n")).collect();
        let (_, left_out) = read(&many, 9).unwrap();
        assert!(left_out.starts_with("30: 10.0.0.0 ") && left_out.ends_with(" 10.0.0.19"));
    }

    #[test]
    fn the_limit_on_entries() {
        let whitelist = Whitelist::parse("10.0.0.0/24").unwrap();
        let template = RuleTemplate::parse(&["drop", "input", "any"]).unwrap();
        let options = ListOptions { lenient: false, ipv6: true };
        let new = || {
            let allowed = Rights::admin(Action::Delete);
            List::new(Sieve::new(&whitelist, &[], template, allowed), options)
        };
        let mut list = new();
        for _ in 0..MAX_ENTRIES / 2 {
            assert_eq!(list.push(b"10.0.0.7\n10.1.0.7\n"), Ok(()));
        }
        assert_eq!(list.push(b"10.1.0.7\n"), Err(ListError::TooMany));
        // Each of these becomes 8 blocks and a hole.
        let mut list = new();
        for _ in 0..MAX_ENTRIES / 9 {
            assert_eq!(list.push(b"10.0.0.0/16\n"), Ok(()));
        }
        assert_eq!(list.push(b"10.0.0.0/16\n"), Err(ListError::TooMany));
    }
}
