//! Tags name the source of a rule. Each source can withdraw its own rules and no others.
//!
//! ```text
//! tag = 1*20( "a"-"z" / "0"-"9" / "." / "_" / "-" )   ; the first a letter or digit
//! ```

use std::fmt;

/// What a tag may be, for messages.
pub const FORM: &str = "1 to 20 of a-z, 0-9, '.', '_' and '-', the first a letter or digit";

/// The longest tag in bytes.
const MAX_LEN: usize = 20;

/// The tag of a rule, or none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Tag([u8; MAX_LEN]);

impl Tag {
    /// The tag of an untagged rule. Untagged rules are a source like any other.
    pub const NONE: Tag = Tag([0; MAX_LEN]);

    pub fn parse(text: &str) -> Option<Tag> {
        let is_first = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let is_allowed = |b: u8| is_first(&b) || b"._-".contains(&b);
        if !text.as_bytes().first().is_some_and(is_first) || !text.bytes().all(is_allowed) {
            return None;
        }
        let mut tag = Tag::NONE;
        tag.0.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(tag)
    }

    /// Splits the tag, if there is one, off the end of a text; `None` if it is invalid.
    pub fn split(text: &str) -> Option<(&str, Tag)> {
        match text.rsplit_once('@') {
            Some((rest, tag)) => Some((rest, Tag::parse(tag)?)),
            None => Some((text, Tag::NONE)),
        }
    }

    /// Empty for an untagged rule.
    pub fn name(&self) -> &str {
        let name = self.0.split(|b| *b == 0).next().unwrap_or_default();
        std::str::from_utf8(name).unwrap_or_default()
    }
}

/// The suffix of a path, a comment or a set's name: `@feed`, or nothing.
impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = if *self == Tag::NONE { "" } else { "@" };
        write!(f, "{at}{}", self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags() {
        for text in ["a", "0", "sshd", "a.b_c-d", "12345678901234567890"] {
            let tag = Tag::parse(text).expect(text);
            assert_eq!((tag.name(), tag.to_string()), (text, format!("@{text}")));
        }
        for text in ["", "A", "-a", ".a", "_a", "a b", "a@b", "a*", "é", "123456789012345678901"] {
            assert_eq!(Tag::parse(text), None, "{text}");
        }
        assert_eq!((Tag::NONE.name(), Tag::NONE.to_string()), ("", String::new()));
    }

    #[test]
    fn tags_at_the_end_of_a_text() {
        let table = [
            ("rfw", Some(("rfw", ""))),
            ("rfw:1@feed", Some(("rfw:1", "feed"))),
            ("a@b@c", Some(("a@b", "c"))),
            ("rfw@", None),
            ("rfw@Feed", None),
        ];
        for (text, expected) in table {
            let split = Tag::split(text);
            assert_eq!(split.as_ref().map(|(rest, tag)| (*rest, tag.name())), expected, "{text}");
        }
    }
}
