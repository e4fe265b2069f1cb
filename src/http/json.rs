//! JSON output (RFC 8259). rfw parses no JSON.

/// A string, escaped and in quotes.
pub fn string(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out += &format!("\\u{:04x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

pub fn number(value: Option<u64>) -> String {
    value.map_or("null".into(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    #[test]
    fn strings_are_escaped() {
        let text = super::string("a\"b\\c\n\u{0}\u{7f}é");
        assert_eq!(text, r#""a\"b\\c\u000a\u0000\u007fé""#);
    }
}
