//! The head of a response (RFC 9112, 4), parsed as strictly as that of a request.
//!
//! ```text
//! status-line = "HTTP/" DIGIT "." DIGIT SP 3DIGIT [ SP reason-phrase ] CRLF
//! ```

use super::request::{Body, Fields, body};
use crate::rule::is_number;
use std::time::Duration;

/// What the client needs to know before it reads the body.
#[derive(PartialEq, Eq, Debug)]
pub struct Head {
    pub status: u16,
    pub body: Body,
    /// How long the server asks to wait; zero if it does not say, or gives a date.
    pub retry_after: Duration,
    /// Whether the connection may carry another request.
    pub keep_alive: bool,
}

impl Head {
    /// Parses a whole head. `None` if it is malformed, or does not state the length of the
    /// body: a truncated body would then look complete.
    pub fn parse(head: &[u8]) -> Option<Head> {
        let text: String = head.iter().map(|byte| char::from(*byte)).collect();
        let mut lines = text.strip_suffix("\r\n\r\n")?.split("\r\n");
        let (version, rest) = lines.next()?.split_once(' ')?;
        let minor = match version {
            "HTTP/1.1" => 1,
            "HTTP/1.0" => 0,
            _ => return None,
        };
        let (status, reason) = rest.split_once(' ').unwrap_or((rest, ""));
        if status.len() != 3
            || !is_number(status)
            || reason.contains(|c: char| c.is_ascii_control())
        {
            return None;
        }
        let fields = Fields::parse(lines).ok()?;
        let mut lengths = ["content-length", "transfer-encoding"].iter();
        lengths.find(|name| fields.all(name).next().is_some())?;
        let seconds = fields.all("retry-after").next().filter(|text| is_number(text));
        let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or_default();
        Some(Head {
            status: status.parse().ok()?,
            body: body(&fields, minor).ok()?,
            retry_after: Duration::from_secs(seconds),
            keep_alive: fields.keep_alive(minor),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(head: &str) -> String {
        Head::parse(head.as_bytes()).map_or("none".into(), |head| {
            let keep = if head.keep_alive { " keep" } else { "" };
            format!("{} {:?} {}{keep}", head.status, head.body, head.retry_after.as_secs())
        })
    }

    #[test]
    fn heads() {
        let table = [
            ("HTTP/1.1 200 OK|Content-Length: 3||", "200 Length(3) 0 keep"),
            ("HTTP/1.1 200|content-length: 003||", "200 Length(3) 0 keep"),
            ("HTTP/1.0 404 \u{e9} no|X: y|Content-Length:0||", "404 Length(0) 0"),
            ("HTTP/1.1 200 |Transfer-Encoding: chunked||", "200 Chunked 0 keep"),
            ("HTTP/1.1 503 B|Retry-After: 7|Content-Length: 1||", "503 Length(1) 7 keep"),
            ("HTTP/1.1 503 B|Retry-After: Fri, 31 Dec|Content-Length: 1||", "503 Length(1) 0 keep"),
            ("HTTP/1.1 503 B|Retry-After: +7|Content-Length: 1||", "503 Length(1) 0 keep"),
            ("HTTP/1.1 200 OK|Connection: x, Close|Content-Length: 3||", "200 Length(3) 0"),
            ("HTTP/1.0 200 OK|Connection: keep-alive|Content-Length: 3||", "200 Length(3) 0 keep"),
            ("HTTP/1.1 200 OK||", "none"),
            ("HTTP/1.1 200 OK|Content-Length: 3|", "none"),
            ("", "none"),
            ("||", "none"),
            ("|HTTP/1.1 200 OK|Content-Length: 3||", "none"),
            ("HTTP/1.1|Content-Length: 3||", "none"),
            ("HTTP/1.1 2000 OK|Content-Length: 3||", "none"),
            ("HTTP/1.1 20 OK|Content-Length: 3||", "none"),
            ("HTTP/1.1 +20 OK|Content-Length: 3||", "none"),
            ("HTTP/1.1  200 OK|Content-Length: 3||", "none"),
            ("HTTP/1.2 200 OK|Content-Length: 3||", "none"),
            ("HTTP/2 200|Content-Length: 3||", "none"),
            ("http/1.1 200 OK|Content-Length: 3||", "none"),
            ("HTTP/1.1 200 \u{1b}[2J|Content-Length: 3||", "none"),
            ("HTTP/1.1 200 O\nK|Content-Length: 3||", "none"),
            ("HTTP/1.1 200 OK|Content-Length: 3\nX: y||", "none"),
            ("HTTP/1.1 200 OK|Content-Length: 3| folded||", "none"),
            ("HTTP/1.1 200 OK|Content-Length: -3||", "none"),
            ("HTTP/1.1 200 OK|Content-Length: 3|Content-Length: 3||", "none"),
            ("HTTP/1.1 200 OK|Content-Length: 3|Transfer-Encoding: chunked||", "none"),
            ("HTTP/1.1 200 OK|Transfer-Encoding: gzip||", "none"),
            ("HTTP/1.0 200 OK|Transfer-Encoding: chunked||", "none"),
        ];
        for (head, expected) in table {
            assert_eq!(read(&head.replace('|', "\r\n")), expected, "{head}");
        }
    }
}
