//! Responses to bytes, and every refusal with its status, code and sentence.

use super::json;
use super::stream::Stream;
use crate::clock::{self, Utc};
use crate::rule::net::Net;
use crate::rule::{RuleError, WIDEST_V4, WIDEST_V6};
use std::fmt::{self, Write};
use std::io::{self, ErrorKind};

/// How much of a body that streams is sent at a time.
const CHUNK: usize = 16 * 1024;

/// Why a request is not carried out. This is the one place where reasons
/// become status codes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Malformed HTTP; the sentence says how.
    BadRequest(&'static str),
    /// No whole head in time.
    Timeout,
    /// A request line over [`super::request::MAX_LINE`].
    LongLine,
    /// A head over [`super::request::MAX_HEAD`] or with too many fields.
    LongHead,
    /// A body where none is taken.
    Body,
    /// An Expect other than 100-continue.
    Expectation,
    /// Something of HTTP that rfw does not do.
    NotImplemented(&'static str),
    /// Not HTTP/1.x.
    Version,
    /// No credentials, or wrong ones.
    Unauthorized,
    /// A path without a meaning.
    NotFound,
    /// A path with a meaning for these methods only.
    Method(&'static str),
    /// A path that names no rule.
    Rule(RuleError),
    /// A parameter that is unknown, given twice, or has a wrong value.
    Query(String),
    /// Not an interval.
    Expire(String),
    /// The change overlaps this whitelisted block.
    Whitelisted(Net),
    /// An IPv6 rule on a host without IPv6.
    NoIpv6,
    /// The kernel did not take the rule; iptables' own words.
    Iptables(String),
    /// Try again in a moment.
    Busy(String),
}

impl Refusal {
    /// The status code.
    pub fn status(&self) -> u16 {
        self.parts().0
    }

    /// Status code, error code and sentence.
    fn parts(&self) -> (u16, &'static str, String) {
        let text = |s: &str| s.to_string();
        match self {
            Refusal::BadRequest(message) => (400, "bad_request", text(message)),
            Refusal::Timeout => (408, "timeout", text("The request did not come in time.")),
            Refusal::LongLine => {
                (414, "too_long", text("The request line may have 8192 bytes at most."))
            }
            Refusal::LongHead => {
                (431, "too_long", text("The head may have 16384 bytes and 64 fields at most."))
            }
            Refusal::Body => (413, "too_large", text("This request takes no body; send none.")),
            Refusal::Expectation => {
                (417, "expectation_failed", text("The only Expect here is 100-continue."))
            }
            Refusal::NotImplemented(message) => (501, "not_implemented", text(message)),
            Refusal::Version => (505, "version", text("Send HTTP/1.1 or HTTP/1.0.")),
            Refusal::Unauthorized => {
                (401, "unauthorized", text("Send the user name and password of rfw.conf."))
            }
            Refusal::NotFound => {
                (404, "not_found", text("No such action or chain; GET / lists what there is."))
            }
            Refusal::Method(allow) => {
                (405, "method_not_allowed", format!("The methods for this path are: {allow}."))
            }
            Refusal::Rule(error) => rule_parts(error),
            Refusal::Query(message) => (400, "bad_query", message.clone()),
            Refusal::Expire(value) => (
                400,
                "bad_expire",
                format!(
                    "'{value}' is no interval; write up to 9 digits and s, m, h or d, as in 10m."
                ),
            ),
            Refusal::Whitelisted(net) => (
                409,
                "whitelisted",
                format!("This overlaps {net} of the whitelist; nothing was changed."),
            ),
            Refusal::NoIpv6 => {
                (400, "bad_address", text("This host filters no IPv6; send IPv4 addresses."))
            }
            Refusal::Iptables(words) => (500, "iptables_failed", words.clone()),
            Refusal::Busy(reason) => (503, "busy", format!("{reason} Try again in a moment.")),
        }
    }
}

/// For the log: status and code.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (status, code, _) = self.parts();
        write!(f, "{status} {code}")
    }
}

fn rule_parts(error: &RuleError) -> (u16, &'static str, String) {
    let (code, message) = match error {
        RuleError::NoTarget(_) | RuleError::NoChain(_) => return Refusal::NotFound.parts(),
        RuleError::Shape => (
            "bad_path",
            "The path must be /TARGET/CHAIN/IFACE/IP[/MASK]; GET / shows all forms.".into(),
        ),
        RuleError::Iface(name) => (
            "bad_interface",
            format!(
                "'{name}' is no interface; write any, or up to 15 of A-Z a-z 0-9 . _ @ - \
                 such as eth0, or ppp for all that start so."
            ),
        ),
        RuleError::Address(text) => (
            "bad_address",
            format!(
                "'{text}' is no address of a host; write one such as 192.0.2.1 or 2001:db8::1."
            ),
        ),
        RuleError::AnyAddress => {
            ("bad_address", "0.0.0.0 and :: stand for any address in FORWARD only.".into())
        }
        RuleError::Families => ("bad_address", "Both addresses must be IPv4, or both IPv6.".into()),
        RuleError::Mask(text) => (
            "bad_mask",
            format!(
                "'{text}' is no mask; write {WIDEST_V4} to 32 for IPv4, {WIDEST_V6} to 128 for IPv6."
            ),
        ),
    };
    (400, code, message)
}

/// What goes back to the client.
#[derive(Debug)]
pub struct Response {
    status: u16,
    content_type: &'static str,
    extra: String,
    body: String,
}

impl Response {
    /// 200 with a JSON text.
    pub fn json(body: String) -> Response {
        Response { status: 200, content_type: "application/json", extra: String::new(), body }
    }

    /// 200 with a text for people.
    pub fn text(body: String) -> Response {
        let content_type = "text/plain; charset=utf-8";
        Response { status: 200, content_type, extra: String::new(), body }
    }

    /// `{"error":CODE,"message":SENTENCE}` with the status and the fields that
    /// belong to it.
    pub fn refusal(refusal: &Refusal) -> Response {
        let (status, code, message) = refusal.parts();
        let extra = match refusal {
            Refusal::Unauthorized => "WWW-Authenticate: Basic realm=\"rfw\"\r\n".into(),
            Refusal::Method(allow) => format!("Allow: {allow}\r\n"),
            Refusal::Busy(_) => "Retry-After: 1\r\n".into(),
            _ => String::new(),
        };
        let (code, message) = (json::string(code), json::string(&message));
        let body = format!("{{\"error\":{code},\"message\":{message}}}\n");
        Response { status, content_type: "application/json", extra, body }
    }

    /// The whole response as bytes; a HEAD request gets no body (RFC 9110, 9.3.2).
    pub fn bytes(&self, keep_alive: bool, head_only: bool) -> String {
        let mut text = head(self.status, self.content_type, keep_alive);
        text.push_str(&self.extra);
        let _ = write!(text, "Content-Length: {}\r\n\r\n", self.body.len());
        if !head_only {
            text.push_str(&self.body);
        }
        text
    }
}

/// A JSON body of unknown length that is sent while it is made: in chunks
/// (RFC 9112, 7.1), or to HTTP/1.0 up to the end of the connection.
pub struct Chunked<'a> {
    stream: &'a mut Stream,
    http11: bool,
    /// The head, until it is sent.
    head: String,
    pending: String,
}

impl<'a> Chunked<'a> {
    /// Nothing is sent before there is a whole [`CHUNK`], or the end.
    pub fn new(stream: &'a mut Stream, http11: bool, keep_alive: bool) -> Chunked<'a> {
        let mut head = head(200, "application/json", keep_alive && http11);
        head.push_str(if http11 { "Transfer-Encoding: chunked\r\n\r\n" } else { "\r\n" });
        Chunked { stream, http11, head, pending: String::new() }
    }

    /// Adds to the body.
    pub fn push(&mut self, text: &str) -> io::Result<()> {
        self.pending.push_str(text);
        match self.pending.len() < CHUNK {
            true => Ok(()),
            false => self.flush(""),
        }
    }

    /// Ends the body. To HTTP/1.0 the end can only be that of the connection.
    pub fn end(mut self) -> io::Result<()> {
        match self.http11 {
            true => self.flush("0\r\n\r\n"),
            false => self.flush("").and(Err(ErrorKind::ConnectionAborted.into())),
        }
    }

    /// Sends a refusal in place of the body; too late for that, an error.
    pub fn refuse(self, refusal: &Refusal) -> io::Result<()> {
        if self.head.is_empty() {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        self.stream.send(Response::refusal(refusal).bytes(true, false).as_bytes())
    }

    fn flush(&mut self, trailer: &str) -> io::Result<()> {
        let mut text = std::mem::take(&mut self.head);
        let body = std::mem::take(&mut self.pending);
        if self.http11 && !body.is_empty() {
            let _ = write!(text, "{:x}\r\n{body}\r\n", body.len());
        } else {
            text.push_str(&body);
        }
        text.push_str(trailer);
        self.stream.send(text.as_bytes())
    }
}

/// The head of a response but for its length and its last CRLF.
fn head(status: u16, content_type: &str, keep_alive: bool) -> String {
    let date = Utc(clock::wall()).http();
    let connection = if keep_alive { "keep-alive" } else { "close" };
    format!(
        "HTTP/1.1 {status} {}\r\nDate: {date}\r\nContent-Type: {content_type}\r\nConnection: {connection}\r\n",
        reason(status)
    )
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        414 => "URI Too Long",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Internal Server Error",
    }
}
