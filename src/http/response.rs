//! Responses to bytes.

use super::api_error::{ApiError, names};
use super::body;
use super::json;
use super::request::{Body, Request};
use super::stream::HttpStream;
use crate::clock::{self, Utc};
use crate::log::printable;
use std::time::Duration;

const JSON: &str = "application/json";
/// How many bytes of a long response are sent at a time.
const CHUNK: usize = 16 * 1024;
/// How long a client may take to receive a response, and a long one.
const RESPONSE_TIME: Duration = Duration::from_secs(5);
const LONG_RESPONSE_TIME: Duration = Duration::from_secs(60);

/// The response to one request. A short one has a Content-Length; a long one is
/// sent while it is generated, in chunks (RFC 9112, 7.1) or, for HTTP/1.0, until
/// the connection is closed.
pub struct ResponseWriter<'a> {
    stream: &'a mut HttpStream,
    /// Whether the connection may serve another request.
    pub keep_alive: bool,
    http11: bool,
    /// The response to HEAD has no body (RFC 9110, 9.3.2).
    head_only: bool,
    /// JSON, unless it is changed before the first [`ResponseWriter::push`].
    pub content_type: &'static str,
    /// Whether the head of a long response has been sent.
    has_begun: bool,
    pending: String,
}

impl<'a> ResponseWriter<'a> {
    pub fn new(stream: &'a mut HttpStream, request: Option<&Request>) -> ResponseWriter<'a> {
        ResponseWriter {
            stream,
            // An unread body would be taken for the next request.
            keep_alive: request.is_some_and(|r| r.keep_alive && r.body == Body::Length(0)),
            http11: request.is_some_and(|request| request.http11),
            head_only: request.is_some_and(|request| request.method == "HEAD"),
            content_type: JSON,
            has_begun: false,
            pending: String::new(),
        }
    }

    /// Reads the request's body; afterwards, the connection may serve another request.
    pub fn receive(
        &mut self,
        request: &Request,
        each: impl FnMut(&[u8]) -> Result<(), ApiError>,
    ) -> Result<(), ApiError> {
        body::receive(self.stream, request, each)?;
        self.keep_alive = request.keep_alive;
        Ok(())
    }

    /// Adds to the body of a response; `false` if the client is gone.
    pub fn push(&mut self, text: &str) -> bool {
        self.pending.push_str(text);
        if self.pending.len() < CHUNK {
            return true;
        }
        if !self.has_begun {
            self.stream.set_deadline(LONG_RESPONSE_TIME);
            self.keep_alive = self.keep_alive && self.http11;
            let coding = if self.http11 { "Transfer-Encoding: chunked\r\n" } else { "" };
            let head = self.head(200, self.content_type, coding);
            self.send(&head);
            self.has_begun = true;
        }
        self.send_pending("")
    }

    /// Adds the end of the body and completes a response with status 200.
    pub fn end(&mut self, text: &str) {
        self.push(text);
        match self.has_begun {
            true => self.send_pending("0\r\n\r\n"),
            false => self.send_whole(200, self.content_type, ""),
        };
    }

    /// Responds with `{"error":CODE,"message":SENTENCE}`. If part of a long response
    /// has been sent, the connection is closed instead, and the client misses the
    /// last chunk. Returns the result for the log, with the message of a 5xx.
    pub fn refuse(&mut self, error: &ApiError) -> String {
        let (status, code, message) = error.describe();
        if self.has_begun {
            self.keep_alive = false;
            let message = printable(message.as_bytes());
            return format!("{status} {code} after a part of the response: '{message}'");
        }
        let text = json::string(&message);
        let extra = error.extra();
        self.pending = format!("{{\"error\":\"{code}\",\"message\":{text}{extra}}}\n");
        self.send_whole(status, JSON, &error.header());
        match status {
            ..500 => format!("{status} {code}"),
            _ => format!("{status} {code} '{}'", printable(message.as_bytes())),
        }
    }

    fn head(&self, status: u16, content_type: &str, fields: &str) -> String {
        format!(
            "HTTP/1.1 {status} {}\r\nDate: {}\r\nContent-Type: {content_type}\r\n\
             Connection: {}\r\n{fields}\r\n",
            names(status).0,
            Utc(clock::wall()).http(),
            if self.keep_alive { "keep-alive" } else { "close" }
        )
    }

    fn send_whole(&mut self, status: u16, content_type: &str, fields: &str) -> bool {
        self.stream.set_deadline(RESPONSE_TIME);
        let body = std::mem::take(&mut self.pending);
        let fields = format!("{fields}Content-Length: {}\r\n", body.len());
        let mut text = self.head(status, content_type, &fields);
        if !self.head_only {
            text.push_str(&body);
        }
        self.send(&text)
    }

    fn send_pending(&mut self, last_chunk: &str) -> bool {
        let body = std::mem::take(&mut self.pending);
        let text = match self.http11 {
            true if body.is_empty() => last_chunk.into(),
            true => format!("{:x}\r\n{body}\r\n{last_chunk}", body.len()),
            false => body,
        };
        self.send(&text)
    }

    fn send(&mut self, text: &str) -> bool {
        let sent = self.stream.send(text).is_ok();
        self.keep_alive = self.keep_alive && sent;
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::super::stream::pair;
    use super::*;
    use std::io::{Read, Write};

    const GET: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
    const OLD: &str = "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";

    /// What the client receives, without the date and with | for CRLF, and whether
    /// the connection is kept alive.
    fn respond(head: &str, make: impl FnOnce(&mut ResponseWriter<'_>)) -> (String, bool) {
        let (mut client, mut stream) = pair();
        let request = Request::parse(head.as_bytes()).unwrap();
        let mut response = ResponseWriter::new(&mut stream, Some(&request));
        make(&mut response);
        let keep = response.keep_alive;
        drop(stream);
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        let lines = text.split("\r\n").filter(|line| !line.starts_with("Date: "));
        (lines.collect::<Vec<_>>().join("|"), keep)
    }

    #[test]
    fn short_responses() {
        let make = |response: &mut ResponseWriter<'_>| {
            assert!(response.push("a") && response.push("b"));
            response.content_type = "text/plain";
            response.end("");
        };
        let head = "HTTP/1.1 200 OK|Content-Type: text/plain|Connection: ";
        let table = [
            (GET, format!("{head}keep-alive|Content-Length: 2||ab"), true),
            (OLD, format!("{head}keep-alive|Content-Length: 2||ab"), true),
            ("GET / HTTP/1.0\r\n\r\n", format!("{head}close|Content-Length: 2||ab"), false),
            ("HEAD / HTTP/1.0\r\n\r\n", format!("{head}close|Content-Length: 2||"), false),
            (
                "PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n",
                format!("{head}close|Content-Length: 2||ab"),
                false,
            ),
        ];
        for (request, expected, keep) in table {
            assert_eq!(respond(request, make), (expected, keep), "{request:?}");
        }
    }

    /// `/metrics` with many tags was JSON.
    #[test]
    fn long_responses_have_their_own_type_too() {
        let (got, _) = respond(GET, |response| {
            response.content_type = "text/plain";
            response.push(&"x".repeat(CHUNK));
            response.end("");
        });
        assert!(got.starts_with("HTTP/1.1 200 OK|Content-Type: text/plain|"), "{got:.100}");
    }

    #[test]
    fn long_responses_are_sent_while_they_are_generated() {
        let text = "x".repeat(CHUNK);
        let head = "HTTP/1.1 200 OK|Content-Type: application/json|Connection: ";
        let make = |pieces: &[&str]| {
            let pieces: Vec<String> = pieces.iter().map(|piece| piece.to_string()).collect();
            move |response: &mut ResponseWriter<'_>| {
                assert!(pieces.iter().all(|piece| response.push(piece)));
                response.end("");
            }
        };
        let (most, last) = (&text[1..], "y");
        let (got, _) = respond(GET, make(&[most]));
        assert_eq!(got, format!("{head}keep-alive|Content-Length: 16383||{most}"));
        let chunked = format!("{head}keep-alive|Transfer-Encoding: chunked||4000|");
        let got = respond(GET, make(&[most, last]));
        assert_eq!(got, (format!("{chunked}{most}{last}|0||"), true));
        let got = respond(GET, make(&[&text, &text, last]));
        assert_eq!(got, (format!("{chunked}{text}|4000|{text}|1|y|0||"), true));
        let got = respond(OLD, make(&[&text, &text, last]));
        assert_eq!(got, (format!("{head}close||{text}{text}y"), false));
    }

    #[test]
    fn errors() {
        let mut logged = String::new();
        let got = respond(GET, |response| logged = response.refuse(&ApiError::Method("PUT")));
        let head = "HTTP/1.1 405 Method Not Allowed|Content-Type: application/json|";
        let text = r#"{"error":"method_not_allowed","message":"This path supports only PUT."}"#;
        let rest = format!("Connection: keep-alive|Allow: PUT|Content-Length: 72||{text}\n");
        assert_eq!(got, (format!("{head}{rest}"), true));
        assert_eq!(logged, "405 method_not_allowed");
        let failure = ApiError::Iptables("no\n".into());
        let got = respond(GET, |response| logged = response.refuse(&failure)).0;
        assert!(
            got.ends_with("{\"error\":\"iptables_failed\",\"message\":\"no\\u000a\"}\n"),
            "{got}"
        );
        assert_eq!(logged, r"500 iptables_failed 'no\n'");
        // In the middle of a response, the connection is closed.
        let (got, keep) = respond(GET, |response| {
            response.push(&"x".repeat(CHUNK));
            logged = response.refuse(&failure);
        });
        assert!(got.ends_with("xxx|") && !keep, "{keep}");
        assert!(
            logged.starts_with("500 iptables_failed after a part of the response: '"),
            "{logged}"
        );
    }

    #[test]
    fn a_connection_is_reusable_after_its_body_is_read() {
        for (connection, kept) in [("x", true), ("close", false)] {
            let (mut client, mut stream) = pair();
            let fields = format!("Host: h\r\nConnection: {connection}\r\nContent-Length: 3");
            write!(client, "PUT / HTTP/1.1\r\n{fields}\r\n\r\nabcd").unwrap();
            let request = stream.request().unwrap().unwrap();
            let mut response = ResponseWriter::new(&mut stream, Some(&request));
            let mut body = Vec::new();
            let each = |bytes: &[u8]| {
                body.extend(bytes);
                Ok(())
            };
            response.receive(&request, each).unwrap();
            assert_eq!((response.keep_alive, &*body), (kept, &b"abc"[..]));
        }
    }

    #[test]
    fn a_client_that_is_gone_is_detected() {
        let (client, mut stream) = pair();
        drop(client);
        let request = Request::parse(GET.as_bytes()).unwrap();
        let mut response = ResponseWriter::new(&mut stream, Some(&request));
        let text = "x".repeat(CHUNK);
        assert!((0..1_000).any(|_| !response.push(&text)));
        assert!(!response.keep_alive);
    }
}
