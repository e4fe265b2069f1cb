//! A list of addresses, read as its bytes come, line by line.
//!
//! ```text
//! list  = *( line LF ) [ line ]
//! line  = *WSP [ entry ] *WSP [ ( "#" / ";" ) comment ] [ CR ]
//! entry = address [ "/" prefix ] / address *WSP "-" *WSP address
//! ```

use super::net::Net;
use super::rights::Allowed;
use super::whitelist::{Permitted, Whitelist};
use super::{Chain, RuleError, RuleTemplate, Rules, is_narrow, take_block};

/// The most blocks in a list; a range counts as the blocks that it comes to.
pub const MAX_ENTRIES: usize = 1_000_000;
/// The longest line in bytes, its comment not counted.
pub const MAX_LINE: usize = 1024;
/// How many wrong lines, and how many whitelisted ones, are told.
const TOLD: usize = 20;

/// What was read of a list so far.
pub struct List<'a> {
    whitelist: &'a Whitelist,
    nets: Vec<Net>,
    /// The first block of each line that overlaps the whitelist.
    left_out: Vec<Net>,
    told: Vec<String>,
    wrong: Wrong,
    lines: usize,
    /// The line that is not yet whole, cut behind MAX_LINE.
    line: Vec<u8>,
}

/// The lines that name no rule.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Wrong {
    pub count: usize,
    /// The first of them, with their numbers, counted from 1.
    pub lines: Vec<(usize, RuleError)>,
}

/// The whitelisted lines of a list.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct LeftOut {
    pub count: usize,
    /// The first of them.
    pub lines: Vec<String>,
}

/// There are more than [`MAX_ENTRIES`].
#[derive(PartialEq, Eq, Debug)]
pub struct TooMany;

impl List<'_> {
    pub fn new(whitelist: &Whitelist) -> List<'_> {
        let (nets, left_out, told, line) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        List { whitelist, nets, left_out, told, wrong: Wrong::default(), lines: 0, line }
    }

    /// Takes the bytes that come next.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), TooMany> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            // One more than may be, and CRLF.
            let room = MAX_LINE.saturating_add(3).saturating_sub(self.line.len());
            self.line.extend(piece.iter().take(room));
            if piece.ends_with(b"\n") {
                self.end_line()?;
            }
        }
        Ok(())
    }

    /// The change of all its rules, whitelisted lines left out; or what is
    /// wrong with it.
    pub fn finish(
        mut self,
        template: RuleTemplate,
        allowed: Allowed,
    ) -> Result<Result<(Permitted, LeftOut), Wrong>, TooMany> {
        self.end_line()?;
        if self.wrong.count > 0 {
            return Ok(Err(self.wrong));
        }
        for nets in [&mut self.nets, &mut self.left_out] {
            nets.sort_unstable();
            nets.dedup();
        }
        let left_out = LeftOut { count: self.left_out.len(), lines: self.told };
        Ok(Ok((Permitted::sifted(Rules::List(template, self.nets), allowed), left_out)))
    }

    fn end_line(&mut self) -> Result<(), TooMany> {
        self.lines = self.lines.saturating_add(1);
        let line = std::mem::take(&mut self.line);
        let whole = line.strip_suffix(b"\n").unwrap_or(&line);
        let whole = whole.strip_suffix(b"\r").unwrap_or(whole);
        let comment = whole.iter().position(|byte| b"#;".contains(byte));
        let entry = whole.get(..comment.unwrap_or(whole.len())).unwrap_or_default();
        let text = String::from_utf8_lossy(entry);
        let text = text.trim_matches([' ', '\t']);
        let blocks = match text {
            _ if entry.len() > MAX_LINE => Err(RuleError::Long),
            "" => Ok(Vec::new()),
            _ => blocks(text),
        };
        match blocks {
            Ok(blocks) => self.sift(text, &blocks)?,
            Err(error) => {
                self.wrong.count = self.wrong.count.saturating_add(1);
                if self.wrong.lines.len() < TOLD {
                    self.wrong.lines.push((self.lines, error));
                }
            }
        }
        self.line = line;
        self.line.clear();
        Ok(())
    }

    fn sift(&mut self, text: &str, blocks: &[Net]) -> Result<(), TooMany> {
        if blocks.iter().any(|net| self.whitelist.overlapping(net).is_some()) {
            self.left_out.extend(blocks.first());
            let text = match blocks {
                [net] => net.to_string(),
                _ => text.into(),
            };
            if self.told.len() < TOLD && !self.told.contains(&text) {
                self.told.push(text);
            }
        } else {
            self.nets.extend(blocks);
        }
        match self.nets.len().saturating_add(self.left_out.len()) > MAX_ENTRIES {
            true => Err(TooMany),
            false => Ok(()),
        }
    }
}

/// One entry, which is held to what the path of a rule in INPUT may name.
fn blocks(entry: &str) -> Result<Vec<Net>, RuleError> {
    if entry.contains('-') {
        let narrow = |nets: &Vec<Net>| nets.iter().all(is_narrow);
        let nets = Net::parse_range(entry).filter(narrow);
        return nets.ok_or_else(|| RuleError::Range(entry.into()));
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
    use crate::rule::Action;
    use crate::rule::rights::{Intent, Rights};
    use crate::rule::tag::Tag;

    fn read(text: &str, step: usize) -> Result<(String, String), String> {
        let whitelist = Whitelist::parse("10.0.0.0/24\n2001:db8::1").unwrap();
        let mut list = List::new(&whitelist);
        for bytes in text.as_bytes().chunks(step) {
            list.push(bytes).unwrap();
        }
        let template = RuleTemplate::parse(&["drop", "output", "eth0"]).unwrap();
        let wrong = |wrong: Wrong| {
            let lines = wrong.lines.iter().map(|(line, error)| format!("{line} {error:?}"));
            format!("{}: {}", wrong.count, lines.collect::<Vec<_>>().join(", "))
        };
        let intent = Intent { action: Action::Delete, tag: Tag::NONE };
        let allowed = Rights::All.allow(intent).unwrap();
        let (permitted, left_out) = list.finish(template, allowed).unwrap().map_err(wrong)?;
        let Rules::List(_, nets) = permitted.into_change().rules else { panic!("no list") };
        let nets: Vec<String> = nets.iter().map(Net::to_string).collect();
        Ok((nets.join(" "), format!("{}: {}", left_out.count, left_out.lines.join(" "))))
    }

    #[test]
    fn lists() {
        let long = format!("1.1.1.1 #{}\n2.2.2.2", "x".repeat(9_999));
        let longest = format!("{}1.1.1.1;", " ".repeat(MAX_LINE - 7));
        let table = [
            ("", "", "0: "),
            ("1.1.1.1", "1.1.1.1", "0: "),
            ("2.2.2.2\n1.1.1.1\r\n", "1.1.1.1 2.2.2.2", "0: "),
            (
                "# feed\n\n ; \n\t7.7.7.77/24 ; SBL1\n2001:DB8::5/64#x",
                "7.7.7.0/24",
                "1: 2001:db8::/64",
            ),
            ("1.1.1.0-1.1.1.2\n1.1.1.2 - 1.1.1.3\n", "1.1.1.0/31 1.1.1.2/31 1.1.1.2", "0: "),
            ("::ffff:1.1.1.1\n1.1.1.1/32\n", "1.1.1.1", "0: "),
            (
                "10.0.0.7\n10.0.0.7/32\n9.255.255.255-10.0.0.0\n",
                "",
                "2: 10.0.0.7 9.255.255.255-10.0.0.0",
            ),
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
    fn wrong_lines() {
        let long = format!("1.1.1.1{}9", " ".repeat(MAX_LINE));
        let cut = format!("1.1.1.1{}\r9", " ".repeat(MAX_LINE - 7));
        let table = [
            ("1.1.1.1\nexample.com\n", r#"1: 2 Address("example.com")"#),
            ("1.1.1.1 2.2.2.2", r#"1: 1 Address("1.1.1.1 2.2.2.2")"#),
            ("0.0.0.0\n::", r#"2: 1 Address("0.0.0.0"), 2 Address("::")"#),
            ("1.0.0.0/8", r#"1: 1 Mask("8")"#),
            ("\n1.1.1.1/24/24", r#"1: 2 Address("1.1.1.1/24/24")"#),
            ("2.2.2.2-1.1.1.1", r#"1: 1 Range("2.2.2.2-1.1.1.1")"#),
            ("1.1.1.1-::1", r#"1: 1 Range("1.1.1.1-::1")"#),
            ("0.0.0.0-1.1.1.1", r#"1: 1 Range("0.0.0.0-1.1.1.1")"#),
            ("1.1.1.0/24-1.1.2.0", r#"1: 1 Range("1.1.1.0/24-1.1.2.0")"#),
            ("10.0.0.1,", r#"1: 1 Address("10.0.0.1,")"#),
            (&long, "1: 1 Long"),
            (&cut, "1: 1 Long"),
        ];
        for (text, wrong) in table {
            assert_eq!(read(text, 5), Err(wrong.into()), "{text}");
        }
        let many = read(&"x\n".repeat(30), 9).unwrap_err();
        assert!(many.starts_with("30: 1 ") && many.ends_with(r#"20 Address("x")"#), "{many}");
        let many: String = (0..30).map(|n| format!("10.0.0.{n}\n")).collect();
        let (_, left_out) = read(&many, 9).unwrap();
        assert!(left_out.starts_with("30: 10.0.0.0 ") && left_out.ends_with(" 10.0.0.19"));
    }

    #[test]
    fn the_most_entries() {
        let whitelist = Whitelist::parse("10.0.0.0/24").unwrap();
        let mut list = List::new(&whitelist);
        for _ in 0..MAX_ENTRIES / 2 {
            assert_eq!(list.push(b"10.0.0.7\n10.1.0.7\n"), Ok(()));
        }
        assert_eq!(list.push(b"10.1.0.7\n"), Err(TooMany));
    }
}
