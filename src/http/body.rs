//! The body of a message (RFC 9112, 6 and 7.1), passed on as it arrives.
//!
//! ```text
//! chunked-body = *( chunk-size exts CRLF chunk-data CRLF )
//!                1*"0" exts CRLF *( field-line CRLF ) CRLF
//! exts         = *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] )
//! ```

use super::api_error::ApiError;
use super::request::{Body, Fields, MAX_FIELDS, Request, is_tchar};
use super::stream::{HttpStream, is_timeout};
use crate::clock;
use std::cell::Cell;
use std::io::{self, BufRead, Read};
use std::iter;
use std::time::{Duration, Instant};

/// The longest body in bytes, including the extensions of its chunks.
pub const MAX_BODY: u64 = 64 << 20;
/// The longest chunk-size or trailer line in bytes, with its CRLF.
const MAX_LINE: u64 = 1024;
/// Enough digits for any size; further bytes of its line count towards [`MAX_BODY`].
const MAX_DIGITS: usize = 16;
/// The time limit for a whole body.
const BODY_TIME: Duration = Duration::from_secs(60);
/// The minimum rate: this many bytes, or the rest, within each such period.
const PACE: (usize, Duration) = (30 * 1024, Duration::from_secs(30));

const LONG: ApiError = ApiError::Http(413, "A list may have at most 67108864 bytes (64 MiB).");
pub const SLOW: ApiError =
    ApiError::Http(408, "A body must arrive within 60 s, and 30 KiB of it in every 30 s.");
pub const SHORT: ApiError = ApiError::Http(400, "The body ended too early; nothing was applied.");
const CHUNK: ApiError =
    ApiError::Http(400, "A chunk must be: SIZE in hex, CRLF, SIZE bytes, CRLF.");

/// Reads the body of a request from its connection.
pub fn receive(
    stream: &mut HttpStream,
    request: &Request,
    mut each: impl FnMut(&[u8]) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    if matches!(request.body, Body::Length(length) if length > MAX_BODY) {
        return Err(LONG);
    }
    // RFC 9110, 10.1.1: not if the client has already begun to send the body.
    if request.expects_continue && !stream.has_received() {
        stream.send("HTTP/1.1 100 Continue\r\n\r\n").map_err(body_error)?;
    }
    let mut pace = Pace { deadline: &stream.deadline, due: 0, end: clock::after(BODY_TIME) };
    pace.count(0);
    read(&mut stream.input, request.body, MAX_BODY, |bytes| {
        pace.count(bytes.len());
        each(bytes)
    })
}

/// Reads a body, passes its pieces to `each`, and leaves what follows unread. Chunks may have
/// `room` bytes in total.
pub fn read<E: From<ApiError>>(
    source: &mut impl BufRead,
    body: Body,
    mut room: u64,
    mut each: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    if let Body::Length(length) = body {
        return pass_on(source, length, &mut each);
    }
    loop {
        let head = line(source)?;
        let size = chunk_size(&head)?;
        // Extensions count too: otherwise, small chunks could carry any number of bytes.
        let taken = size.saturating_add(head.len().saturating_sub(MAX_DIGITS) as u64);
        room = room.checked_sub(taken).ok_or(LONG)?;
        if size == 0 {
            break;
        }
        pass_on(source, size, &mut each)?;
        if !line(source)?.is_empty() {
            return Err(CHUNK.into());
        }
    }
    for _ in 0..=MAX_FIELDS {
        let trailer = line(source)?;
        if trailer.is_empty() {
            return Ok(());
        }
        Fields::parse(iter::once(&*trailer))?;
    }
    Err(CHUNK.into())
}

fn pass_on<E: From<ApiError>>(
    source: &mut impl BufRead,
    mut left: u64,
    each: &mut impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    while left > 0 {
        let bytes = source.fill_buf().map_err(body_error)?;
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let bytes = bytes.get(..most).filter(|bytes| !bytes.is_empty()).ok_or(SHORT)?;
        each(bytes)?;
        left = left.saturating_sub(most as u64);
        source.consume(most);
    }
    Ok(())
}

/// Reads a line without its CRLF, as one character per byte.
fn line(source: &mut impl BufRead) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    source.take(MAX_LINE).read_until(b'\n', &mut bytes).map_err(body_error)?;
    let line = match bytes.strip_suffix(b"\r\n") {
        Some(line) if !line.contains(&b'\r') => line,
        _ if bytes.is_empty() => return Err(SHORT),
        _ => return Err(CHUNK),
    };
    Ok(line.iter().map(|byte| char::from(*byte)).collect())
}

fn chunk_size(line: &str) -> Result<u64, ApiError> {
    let end = line.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(line.len());
    let (digits, extensions) = line.split_at(end);
    match digits.is_empty() || skip_extensions(extensions).is_none() {
        true => Err(CHUNK),
        false => u64::from_str_radix(digits, 16).map_err(|_| LONG),
    }
}

/// Checks chunk extensions (7.1.1), all of which are ignored.
fn skip_extensions(mut text: &str) -> Option<()> {
    while !text.is_empty() {
        text = skip_token(bws(bws(text).strip_prefix(';')?))?;
        if let Some(value) = bws(text).strip_prefix('=').map(bws) {
            text = match value.strip_prefix('"') {
                Some(quoted) => skip_quoted(quoted)?,
                None => skip_token(value)?,
            };
        }
    }
    Some(())
}

/// "Bad" white space, RFC 9110, 5.6.3.
fn bws(text: &str) -> &str {
    text.trim_start_matches([' ', '\t'])
}

fn skip_token(text: &str) -> Option<&str> {
    let end = text.find(|c| !is_tchar(c)).unwrap_or(text.len());
    text.get(end..).filter(|_| end > 0)
}

/// The text after a quoted-string (RFC 9110, 5.6.4) whose opening quote is read.
fn skip_quoted(text: &str) -> Option<&str> {
    let mut chars = text.chars();
    loop {
        let char = match chars.next()? {
            '"' => return Some(chars.as_str()),
            '\\' => chars.next()?,
            char => char,
        };
        if char.is_ascii_control() && char != '\t' {
            return None;
        }
    }
}

fn body_error(error: io::Error) -> ApiError {
    if is_timeout(&error) { SLOW } else { SHORT }
}

/// The deadline of a client that must keep up with [`PACE`].
struct Pace<'a> {
    deadline: &'a Cell<Instant>,
    /// Bytes that must still arrive in the current period.
    due: usize,
    /// The deadline of the whole body.
    end: Instant,
}

impl Pace<'_> {
    /// Counts bytes that have arrived. When none is due, the next period starts.
    fn count(&mut self, bytes: usize) {
        self.due = self.due.saturating_sub(bytes);
        if self.due == 0 {
            self.due = PACE.0;
            self.deadline.set(self.end.min(clock::after(PACE.1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::stream::pair;
    use super::*;
    use std::io::Write;
    use std::net::Shutdown;

    /// The body or the error's status, and the bytes after it.
    fn read_all(mut bytes: &[u8], body: Body) -> (String, String) {
        let mut text = String::new();
        let each = |bytes: &[u8]| {
            text.push_str(std::str::from_utf8(bytes).unwrap());
            Ok::<(), ApiError>(())
        };
        let result = read(&mut bytes, body, MAX_BODY, each);
        let text = result.map_or_else(|error| error.describe().0.to_string(), |()| text);
        (text, String::from_utf8_lossy(bytes).into())
    }

    #[test]
    fn lengths() {
        assert_eq!(read_all(b"abcd", Body::Length(3)), ("abc".into(), "d".into()));
        assert_eq!(read_all(b"ab", Body::Length(3)).0, "400");
    }

    #[test]
    fn chunks() {
        let table = [
            ("0\r\n\r\n", "", ""),
            ("3\r\nabc\r\n0\r\n\r\nGET", "abc", "GET"),
            ("1\r\na\r\n0002\r\nbc\r\n00\r\n\r\n", "abc", ""),
            ("A;n=v;m\r\n0123456789\r\n0 ; x=\"y\"\r\nX: y\r\nZ:\r\n\r\n", "0123456789", ""),
            ("0;a = \"q\\\"; \t\u{e9}\" ;\tb\r\n\r\n", "", ""),
        ];
        for (bytes, body, left) in table {
            let got = read_all(bytes.as_bytes(), Body::Chunked);
            assert_eq!(got, (body.into(), left.into()), "{bytes:?}");
        }
        let wrong = [
            ("", "400"),
            ("\r\n", "400"),
            ("3\nabc\r\n0\r\n\r\n", "400"),
            ("3\r\nabc0\r\n\r\n", "400"),
            ("3\r\nabcd\r\n0\r\n\r\n", "400"),
            ("3\r\nab", "400"),
            ("3\r\nabc\r\n", "400"),
            ("3\r\nabc\r\n0\r\n", "400"),
            ("+3\r\nabc\r\n0\r\n\r\n", "400"),
            ("0x3\r\nabc\r\n0\r\n\r\n", "400"),
            (" 3\r\nabc\r\n0\r\n\r\n", "400"),
            ("3 \r\nabc\r\n0\r\n\r\n", "400"),
            ("3;a\0\r\nabc\r\n0\r\n\r\n", "400"),
            ("3;\r\nabc\r\n0\r\n\r\n", "400"),
            ("3;a;\r\nabc\r\n0\r\n\r\n", "400"),
            ("3;a \r\nabc\r\n0\r\n\r\n", "400"),
            ("3;a=\r\nabc\r\n0\r\n\r\n", "400"),
            ("3;a=\"b\r\nabc\r\n0\r\n\r\n", "400"),
            ("3;a=\"b\"c\r\nabc\r\n0\r\n\r\n", "400"),
            ("3;a=\"\\\"\r\nabc\r\n0\r\n\r\n", "400"),
            ("3;a=\"\x7f\"\r\nabc\r\n0\r\n\r\n", "400"),
            ("3 a\r\nabc\r\n0\r\n\r\n", "400"),
            ("3;\r;\r\nabc\r\n0\r\n\r\n", "400"),
            ("0\r\nX : y\r\n\r\n", "400"),
            ("0\r\n folded\r\n\r\n", "400"),
            ("10000000000000000\r\n", "413"),
            ("4000001\r\n", "413"),
        ];
        for (bytes, status) in wrong {
            assert_eq!(read_all(bytes.as_bytes(), Body::Chunked).0, status, "{bytes:?}");
        }
        // A truncated body is distinguished from a malformed chunk.
        for (bytes, error) in [("3\r\nabc\r\n", SHORT), ("x", CHUNK), ("0\n", CHUNK)] {
            let result = read(&mut bytes.as_bytes(), Body::Chunked, MAX_BODY, |_| Ok(()));
            assert_eq!(result, Err(error));
        }
        let line = |n: usize| format!("0;{}\r\n\r\n", "x".repeat(n - 4));
        assert_eq!(read_all(line(MAX_LINE as usize).as_bytes(), Body::Chunked).0, "");
        assert_eq!(read_all(line(MAX_LINE as usize + 1).as_bytes(), Body::Chunked).0, "400");
        let trailers = |n: usize| format!("0\r\n{}\r\n", "X: y\r\n".repeat(n));
        assert_eq!(read_all(trailers(MAX_FIELDS).as_bytes(), Body::Chunked).0, "");
        assert_eq!(read_all(trailers(MAX_FIELDS + 1).as_bytes(), Body::Chunked).0, "400");
    }

    #[test]
    fn a_waiting_client_gets_100_continue() {
        for (with_head, later, expected) in
            [("", "abc", "abc"), ("abc", "", "abc"), ("", "", "400")]
        {
            let (mut client, mut stream) = pair();
            let fields = "Host: h\r\nExpect: 100-continue\r\nContent-Length: 3";
            write!(client, "PUT / HTTP/1.1\r\n{fields}\r\n\r\n{with_head}").unwrap();
            let request = stream.request().unwrap().unwrap();
            client.write_all(later.as_bytes()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut body = String::new();
            let each = |bytes: &[u8]| {
                body.extend(bytes.iter().map(|byte| char::from(*byte)));
                Ok(())
            };
            let result = receive(&mut stream, &request, each);
            let body = result.map_or_else(|error| error.describe().0.to_string(), |()| body);
            assert_eq!(body, expected);
            drop(stream);
            let mut interim = String::new();
            client.read_to_string(&mut interim).unwrap();
            let expected = if with_head.is_empty() { "HTTP/1.1 100 Continue\r\n\r\n" } else { "" };
            assert_eq!(interim, expected);
        }
    }

    #[test]
    fn a_long_body_is_refused_before_it_arrives() {
        let (client, mut stream) = pair();
        client.shutdown(Shutdown::Write).unwrap();
        for (length, expected) in [(MAX_BODY + 1, LONG), (MAX_BODY, SHORT)] {
            let head = format!("PUT / HTTP/1.0\r\nContent-Length: {length}\r\n\r\n");
            let request = Request::parse(head.as_bytes()).unwrap();
            assert_eq!(receive(&mut stream, &request, |_| Ok(())), Err(expected));
        }
    }

    #[test]
    fn a_body_must_keep_the_pace() {
        assert_eq!(PACE.0 as u64, 1024 * PACE.1.as_secs());
        // A new period starts with the last byte due, not earlier, and not after the end.
        for (due, end, expected) in [(3, 20, 20), (4, 20, 0), (3, 90, 30)] {
            let before = Instant::now();
            let deadline = Cell::new(before);
            let end = before + Duration::from_secs(end);
            let mut pace = Pace { deadline: &deadline, due, end };
            pace.count(2);
            assert_eq!(deadline.get(), before);
            pace.count(1);
            let moved = deadline.get() - before;
            let expected = Duration::from_secs(expected);
            assert!(moved >= expected && moved < expected + Duration::from_secs(9), "{moved:?}");
        }
        let (_client, mut stream) = pair();
        stream.set_deadline(Duration::ZERO);
        assert_eq!(read(&mut stream.input, Body::Length(1), MAX_BODY, |_| Ok(())), Err(SLOW));
    }
}
