//! The head of a request (RFC 9112), parsed strictly: what two parsers could
//! interpret differently is refused.
//!
//! ```text
//! head         = [ CRLF ] request-line CRLF *( field-line CRLF ) CRLF
//! request-line = method SP request-target SP "HTTP/" DIGIT "." DIGIT     (3)
//! field-line   = field-name ":" OWS field-value OWS                      (5)
//! ```

use super::api_error::ApiError;
use crate::rule::is_number;

/// The longest request line in bytes, without its CRLF.
pub const MAX_LINE: usize = 8 * 1024;
/// The longest head in bytes, with all its CRLFs.
pub const MAX_HEAD: usize = 16 * 1024;
/// The most field lines.
pub const MAX_FIELDS: usize = 64;

const LONG_LINE: ApiError = ApiError::Http(414, "The request line may have at most 8192 bytes.");
const LONG_HEAD: ApiError =
    ApiError::Http(431, "The head may have at most 16384 bytes and 64 fields.");
const VERSION: ApiError = ApiError::Http(505, "Send HTTP/1.1 or HTTP/1.0.");
const EXPECTATION: ApiError = ApiError::Http(417, "The only supported Expect is 100-continue.");

fn bad(message: &'static str) -> ApiError {
    ApiError::Http(400, message)
}

/// The length of the body that the head states (RFC 9112, 6.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Body {
    /// In bytes; zero if the head states none.
    Length(u64),
    /// Chunks until the last one.
    Chunked,
}

/// A request whose head is well formed.
#[derive(PartialEq, Eq, Debug)]
pub struct Request {
    pub method: String,
    /// The path of the target, not decoded; `*` for `OPTIONS *`.
    pub path: String,
    pub query: Option<String>,
    /// The authority that the client addresses, from the target or from Host.
    pub host: Option<String>,
    pub authorization: Option<String>,
    pub body: Body,
    /// Whether the client waits for a 100 before it sends the body.
    pub expects_continue: bool,
    /// Whether the client speaks HTTP/1.1, which includes chunks.
    pub http11: bool,
    /// Whether the connection may serve another request (9.3).
    pub keep_alive: bool,
}

/// The length of the head in what was received so far; `None` if it is not yet
/// complete. The result depends only on the bytes, not on how they are split.
pub fn head_length(received: &[u8]) -> Result<Option<usize>, ApiError> {
    let mut start = 0_usize;
    let mut first = true;
    while let Some(rest) = received.get(start..) {
        let length = rest.iter().position(|b| matches!(b, b'\r' | b'\n')).unwrap_or(rest.len());
        let end = start.saturating_add(length).saturating_add(2);
        if first && length > MAX_LINE {
            return Err(LONG_LINE);
        }
        if end > MAX_HEAD {
            return Err(LONG_HEAD);
        }
        match rest.get(length..).unwrap_or_default() {
            [] | [b'\r'] => return Ok(None),
            [b'\r', b'\n', ..] => {}
            _ => return Err(bad("A line must end in CRLF, and contain no other CR or LF.")),
        }
        // One empty line before the request line is ignored (2.2).
        if length == 0 && start > 0 {
            return Ok(Some(end));
        }
        first = length == 0;
        start = end;
    }
    Ok(None)
}

impl Request {
    /// Parses a whole head, of the length that [`head_length`] returns.
    pub fn parse(head: &[u8]) -> Result<Request, ApiError> {
        // One character per byte, because values may contain obs-text (RFC 9110, 5.5).
        let text: String = head.iter().map(|b| char::from(*b)).collect();
        let mut lines = text.trim_start_matches("\r\n").trim_end_matches("\r\n").split("\r\n");
        let (method, target, minor) = request_line(lines.next().unwrap_or_default())?;
        let fields = Fields::parse(lines)?;
        let (authority, path, query) = target_parts(method, target)?;
        let host = host(&fields, minor)?;
        // RFC 9110, 10.1.1: the Expect of HTTP/1.0 is ignored.
        let expect = fields.single("expect")?.filter(|_| minor > 0);
        if expect.is_some_and(|value| !value.eq_ignore_ascii_case("100-continue")) {
            return Err(EXPECTATION);
        }
        Ok(Request {
            method: method.into(),
            path: path.into(),
            query: query.map(Into::into),
            host: authority.or(host).map(Into::into),
            authorization: fields.single("authorization")?.map(Into::into),
            body: body(&fields, minor)?,
            expects_continue: expect.is_some(),
            http11: minor > 0,
            keep_alive: fields.keep_alive(minor),
        })
    }

    /// Whether the request is for localhost, by name or address, with any port.
    pub fn is_for_localhost(&self) -> bool {
        let host = self.host.as_deref().unwrap_or_default();
        let name = match host.rsplit_once(':') {
            Some((name, port)) if is_number(port) => name,
            _ => host,
        };
        ["localhost", "127.0.0.1", "[::1]"].iter().any(|known| known.eq_ignore_ascii_case(name))
    }

    /// Method and target as received, for the log.
    pub fn line(&self) -> String {
        let query = self.query.as_ref().map(|query| format!("?{query}"));
        format!("{} {}{}", self.method, self.path, query.unwrap_or_default())
    }
}

fn request_line(line: &str) -> Result<(&str, &str, u8), ApiError> {
    let malformed = bad("The request line must be: METHOD SP TARGET SP HTTP/1.1.");
    let [method, target, version] = *line.split(' ').collect::<Vec<_>>() else {
        return Err(malformed);
    };
    if !is_token(method) {
        return Err(malformed);
    }
    match version.strip_prefix("HTTP/").map(str::as_bytes) {
        Some([b'1', b'.', minor @ b'0'..=b'9']) => Ok((method, target, minor.saturating_sub(b'0'))),
        Some([b'0'..=b'9', b'.', b'0'..=b'9']) => Err(VERSION),
        _ => Err(malformed),
    }
}

/// Origin form, absolute form, or `*` for OPTIONS (RFC 9112, 3.2); the
/// authority form of CONNECT is for proxies.
fn target_parts<'a>(
    method: &str,
    target: &'a str,
) -> Result<(Option<&'a str>, &'a str, Option<&'a str>), ApiError> {
    if method == "CONNECT" {
        return Err(ApiError::Http(501, "rfw is not a proxy: CONNECT is not implemented."));
    }
    if target == "*" && method == "OPTIONS" {
        return Ok((None, target, None));
    }
    let (authority, target) = match target.split_once("://") {
        Some((scheme, rest)) if !target.starts_with('/') => {
            let known = ["http", "https"].iter().any(|known| known.eq_ignore_ascii_case(scheme));
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            let (authority, target) = rest.split_at(end);
            if !known || authority.is_empty() || !is_authority(authority) {
                return Err(bad("The target must be a path, or a whole http or https URI."));
            }
            (Some(authority), target)
        }
        _ => (None, target),
    };
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    let path = if authority.is_some() && path.is_empty() { "/" } else { path };
    if !path.starts_with('/')
        || !is_pchars(path, "/")
        || !is_pchars(query.unwrap_or_default(), "/?")
    {
        return Err(bad(
            "The path and the query may contain only letters, digits, -._~!$&'()*+,;=:@ and %XX escapes; \
             write an IPv6 address without brackets.",
        ));
    }
    Ok((authority, path, query))
}

/// Whether all characters are pchar (RFC 3986, 3.3) or in `also`.
fn is_pchars(text: &str, also: &str) -> bool {
    let is_known =
        |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=:@".contains(c) || also.contains(c);
    let is_escape = |rest: &str| rest.bytes().take(2).filter(u8::is_ascii_hexdigit).count() == 2;
    text.chars().all(is_known) && text.split('%').skip(1).all(is_escape)
}

/// The field lines of one head, or those after a body (trailers); names as sent.
pub(super) struct Fields<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Fields<'a> {
    pub(super) fn parse(lines: impl Iterator<Item = &'a str>) -> Result<Fields<'a>, ApiError> {
        let mut fields = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(':').unwrap_or_default();
            // A name with a space at either end, or an obs-fold (5.2), is not a token.
            if !is_token(name) {
                return Err(bad("A field line must be NAME:VALUE, with no space in the name."));
            }
            let control = |c: char| c.is_ascii_control() && c != '\t';
            if value.contains(control) {
                return Err(bad("A field value must contain no control characters."));
            }
            if fields.len() >= MAX_FIELDS {
                return Err(LONG_HEAD);
            }
            fields.push((name, value.trim_matches([' ', '\t'])));
        }
        Ok(Fields(fields))
    }

    pub(super) fn all(&self, name: &str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }

    /// Whether the connection may carry another message (9.3).
    pub(super) fn keep_alive(&self, minor: u8) -> bool {
        let wants = |option: &str| {
            let mut options = self.all("connection").flat_map(|value| value.split(','));
            options.any(|token| token.trim_matches([' ', '\t']).eq_ignore_ascii_case(option))
        };
        !wants("close") && (minor > 0 || wants("keep-alive"))
    }

    /// The value of a field that may occur only once.
    fn single(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        let mut values = self.all(name);
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            _ => Err(bad("Host, Content-Length, Expect and Authorization may occur only once.")),
        }
    }
}

/// RFC 9112, 3.2: HTTP/1.1 requires exactly one Host, and a valid one.
fn host<'a>(fields: &Fields<'a>, minor: u8) -> Result<Option<&'a str>, ApiError> {
    let host = fields.single("host")?;
    match host {
        None if minor > 0 => Err(bad("HTTP/1.1 requires a Host field.")),
        Some(host) if !host.is_empty() && !is_authority(host) => {
            Err(bad("The Host field must be a host name or address, with or without a port."))
        }
        _ => Ok(host),
    }
}

/// RFC 3986, 3.2.2 and 3.2.3, without user information.
pub fn is_authority(text: &str) -> bool {
    let (host, port) = match text.rfind(']') {
        Some(end) => text.split_at(end.saturating_add(1)),
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let host_ok = match host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')) {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && !host.contains(['[', ']', ':', '@']) && is_pchars(host, ""),
    };
    host_ok && (matches!(port, "" | ":") || port.strip_prefix(':').is_some_and(is_number))
}

/// RFC 9112, 6.1 to 6.3: the length is stated in at most one way.
pub(super) fn body(fields: &Fields<'_>, minor: u8) -> Result<Body, ApiError> {
    let length = fields.single("content-length")?;
    let codings: Vec<&str> = fields.all("transfer-encoding").collect();
    match (&*codings, length) {
        ([], None) => Ok(Body::Length(0)),
        // A length beyond a u64 exceeds every limit.
        ([], Some(text)) if is_number(text) => Ok(Body::Length(text.parse().unwrap_or(u64::MAX))),
        ([], Some(_)) => Err(bad("Content-Length must be digits.")),
        (_, Some(_)) => Err(bad("Content-Length and Transfer-Encoding exclude each other.")),
        _ if minor == 0 => Err(bad("HTTP/1.0 has no Transfer-Encoding.")),
        ([coding], _) if coding.eq_ignore_ascii_case("chunked") => Ok(Body::Chunked),
        _ => Err(ApiError::Http(501, "The only supported Transfer-Encoding is chunked.")),
    }
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.chars().all(is_tchar)
}

/// RFC 9110, 5.6.2.
pub fn is_tchar(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A parsed head in one line, or its error.
    fn read(head: &[u8]) -> String {
        let length = match head_length(head) {
            Ok(Some(length)) => length,
            Ok(None) => return "more".into(),
            Err(error) => return error.describe().0.to_string(),
        };
        match Request::parse(&head[..length]) {
            Err(error) => error.describe().0.to_string(),
            Ok(r) => {
                let query = r.query.map(|q| format!("?{q}")).unwrap_or_default();
                let host = r.host.unwrap_or("-".into());
                let flags =
                    [(r.keep_alive, " keep"), (!r.http11, " 1.0"), (r.expects_continue, " expect")];
                let flags: String = flags.iter().filter(|(on, _)| *on).map(|(_, f)| *f).collect();
                format!("{} {}{query} {host} {:?}{flags}", r.method, r.path, r.body)
            }
        }
    }

    #[test]
    fn names_of_the_local_host() {
        let table = [
            ("localhost", true),
            ("LocalHost:8080", true),
            ("127.0.0.1:1", true),
            ("[::1]", true),
            ("[::1]:7390", true),
            ("", false),
            ("localhost:", false),
            ("localhost.example.com", false),
            ("example.com:7390", false),
            ("127.0.0.2", false),
            ("[::2]", false),
        ];
        for (host, expected) in table {
            let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let request = Request::parse(head.as_bytes()).unwrap();
            assert_eq!(request.is_for_localhost(), expected, "{host:?}");
        }
        assert!(!Request::parse(b"GET / HTTP/1.0\r\n\r\n").unwrap().is_for_localhost());
    }

    fn with(fields: &str) -> String {
        format!("PUT / HTTP/1.1\r\nHost: h\r\n{fields}\r\n")
    }

    #[test]
    fn well_formed_heads() {
        let table = [
            ("GET / HTTP/1.1\r\nHost: h\r\n\r\n", "GET / h Length(0) keep"),
            ("\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", "GET / h Length(0) keep"),
            ("GET / HTTP/1.0\r\n\r\n", "GET / - Length(0) 1.0"),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "GET / - Length(0) keep 1.0"),
            ("GET / HTTP/1.0\r\nExpect: tea\r\n\r\n", "GET / - Length(0) 1.0"),
            ("GET / HTTP/1.7\r\nHost:\r\n\r\n", "GET /  Length(0) keep"),
            (
                "GET /a%2Fb?c=d?e/ HTTP/1.1\r\nhOST:\t[::1]:80 \r\n\r\n",
                "GET /a%2Fb?c=d?e/ [::1]:80 Length(0) keep",
            ),
            ("GET HTTP://a:7/x?y HTTP/1.1\r\nHost: b\r\n\r\n", "GET /x?y a:7 Length(0) keep"),
            ("GET http://a HTTP/1.1\r\nHost: b\r\n\r\n", "GET / a Length(0) keep"),
            ("GET http://a?q HTTP/1.1\r\nHost: b\r\n\r\n", "GET /?q a Length(0) keep"),
            ("GET /http://a HTTP/1.1\r\nHost: b\r\n\r\n", "GET /http://a b Length(0) keep"),
            ("OPTIONS * HTTP/1.1\r\nHost: b\r\n\r\n", "OPTIONS * b Length(0) keep"),
            (
                "M!#$%&'*+-.^_`|~9 / HTTP/1.1\r\nHost: b\r\n\r\n",
                "M!#$%&'*+-.^_`|~9 / b Length(0) keep",
            ),
        ];
        for (head, expected) in table {
            assert_eq!(read(head.as_bytes()), expected, "{head:?}");
        }
        let fields = [
            ("", "Length(0) keep"),
            ("Content-Length: 007\r\n", "Length(7) keep"),
            ("Content-Length: 99999999999999999999\r\n", "Length(18446744073709551615) keep"),
            ("Transfer-Encoding: Chunked\r\n", "Chunked keep"),
            ("Expect: 100-Continue\r\n", "Length(0) keep expect"),
            ("Connection: x, Close\r\n", "Length(0)"),
            ("Connection: keep-alive\r\nConnection: close\r\n", "Length(0)"),
            ("Empty:\r\nTab: a\tb\r\n", "Length(0) keep"),
        ];
        for (field, expected) in fields {
            assert_eq!(read(with(field).as_bytes()), format!("PUT / h {expected}"), "{field:?}");
        }
        assert_eq!(
            read(b"PUT / HTTP/1.1\r\nHost: h\r\nLatin: \xe9\r\n\r\n"),
            "PUT / h Length(0) keep"
        );
    }

    #[test]
    fn request_lines_in_the_log() {
        for (target, line) in [("/a%20b", "PUT /a%20b"), ("http://h?x=%00", "PUT /?x=%00")] {
            let head = format!("PUT {target} HTTP/1.0\r\n\r\n");
            assert_eq!(Request::parse(head.as_bytes()).unwrap().line(), line);
        }
    }

    #[test]
    fn malformed_heads() {
        let lines = [
            ("", "400"),
            ("GET /", "400"),
            ("GET / HTTP/1.1 ", "400"),
            ("GET  / HTTP/1.1", "400"),
            (" GET / HTTP/1.1", "400"),
            ("GET\t/ HTTP/1.1", "400"),
            ("GE(T / HTTP/1.1", "400"),
            ("GET / http/1.1", "400"),
            ("GET / HTTP/1.10", "400"),
            ("GET / HTTP/11", "400"),
            ("GET / HTTP/2.0", "505"),
            ("GET / HTTP/0.9", "505"),
            ("GET x HTTP/1.1", "400"),
            ("GET * HTTP/1.1", "400"),
            ("GET /a#b HTTP/1.1", "400"),
            ("GET /a\"b HTTP/1.1", "400"),
            ("GET /%4 HTTP/1.1", "400"),
            ("GET /%zz HTTP/1.1", "400"),
            ("GET /?% HTTP/1.1", "400"),
            ("GET /\u{e9} HTTP/1.1", "400"),
            ("GET /\0 HTTP/1.1", "400"),
            ("GET ftp://a/ HTTP/1.1", "400"),
            ("GET http:///x HTTP/1.1", "400"),
            ("GET http://u@a/ HTTP/1.1", "400"),
            ("CONNECT a:1 HTTP/1.1", "501"),
        ];
        for (line, status) in lines {
            assert_eq!(read(format!("{line}\r\nHost: h\r\n\r\n").as_bytes()), status, "{line:?}");
        }
        let fields = [
            ("Host: i\r\n", "400"),
            ("X\r\n", "400"),
            (": y\r\n", "400"),
            ("X : y\r\n", "400"),
            (" X: y\r\n", "400"),
            ("X: y\r\n folded\r\n", "400"),
            ("X: a\0b\r\n", "400"),
            ("X: a\x7fb\r\n", "400"),
            ("X: a\rb\r\n", "400"),
            ("X: a\n", "400"),
            ("Content-Length: +1\r\n", "400"),
            ("Content-Length: 1, 1\r\n", "400"),
            ("Content-Length: 0x1\r\n", "400"),
            ("Content-Length:\r\n", "400"),
            ("Content-Length: 1\r\nContent-Length: 1\r\n", "400"),
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", "400"),
            ("Transfer-Encoding: gzip\r\n", "501"),
            ("Transfer-Encoding: gzip, chunked\r\n", "501"),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "501"),
            ("Expect: tea\r\n", "417"),
            ("Authorization: a\r\nAuthorization: a\r\n", "400"),
        ];
        for (field, status) in fields {
            assert_eq!(read(with(field).as_bytes()), status, "{field:?}");
        }
        let text = with("Content-Length: x\r\n");
        assert_eq!(Request::parse(text.as_bytes()), Err(bad("Content-Length must be digits.")));
        let text = "GET /drop/input/any/[2001:db8::1] HTTP/1.1\r\nHost: h\r\n\r\n";
        let error = format!("{:?}", Request::parse(text.as_bytes()));
        assert!(error.contains("write an IPv6 address without brackets"), "{error}");
        let hosts = ["a b", "a/b", "a@b", "a:x", ":80", "[::1", "[x]", "a]", "::1"];
        for host in hosts {
            let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            assert_eq!(read(head.as_bytes()), "400", "{host:?}");
        }
        assert_eq!(read(b"GET / HTTP/1.1\r\n\r\n"), "400", "no Host");
        assert_eq!(read(b"PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"), "400");
        assert_eq!(read(b"\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"), "400");
    }

    #[test]
    fn limits() {
        let line = |n: usize| format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "a".repeat(n - 14));
        assert!(read(line(MAX_LINE).as_bytes()).starts_with("GET"));
        assert_eq!(read(line(MAX_LINE + 1).as_bytes()), "414");

        let head = |n: usize| with(&format!("X: {}\r\n", "a".repeat(n - with("X: \r\n").len())));
        assert!(read(head(MAX_HEAD).as_bytes()).starts_with("PUT"));
        assert_eq!(read(head(MAX_HEAD + 1).as_bytes()), "431");

        let many = |n: usize| with(&"X: y\r\n".repeat(n - 1));
        assert!(read(many(MAX_FIELDS).as_bytes()).starts_with("PUT"));
        assert_eq!(read(many(MAX_FIELDS + 1).as_bytes()), "431");
    }

    #[test]
    fn a_head_parses_alike_however_it_is_split() {
        let long = "a".repeat(MAX_LINE + 9);
        let heads = [
            with("X: y\r\n") + "GET /next",
            with("X: a\nb\r\n"),
            with("X: a\rb\r\n"),
            format!("GET /{long}\n"),
            format!("{}\n", with(&format!("X: {long}{long}\r\n"))),
            "\r\n\r\nGET".into(),
            "\n".into(),
        ];
        for head in heads {
            let whole = head_length(head.as_bytes());
            let mut prefixes = (1..=head.len()).map(|n| head_length(&head.as_bytes()[..n]));
            let first = prefixes.find(|verdict| *verdict != Ok(None)).unwrap_or(Ok(None));
            assert_eq!(first, whole, "{:?}", &head[..head.len().min(60)]);
        }
    }
}
