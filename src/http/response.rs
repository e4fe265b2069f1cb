//! Answers to bytes.

use super::body;
use super::json;
use super::refusal::{Refusal, names};
use super::request::{Body, Request};
use super::stream::Stream;
use crate::clock::{self, Utc};
use crate::log::printable;
use std::time::Duration;

/// How many bytes of a long answer are sent at a time.
const CHUNK: usize = 16 * 1024;
/// How long a client may take to receive an answer, and a long one.
const ANSWER_TIME: Duration = Duration::from_secs(10);
const LIST_TIME: Duration = Duration::from_secs(60);

/// The answer to one request. A short one has a Content-Length; a long one is
/// sent while it is made, in chunks (RFC 9112, 7.1), or to HTTP/1.0 up to the
/// end of the connection.
pub struct Reply<'a> {
    stream: &'a mut Stream,
    /// Whether the connection may serve another request.
    pub keep: bool,
    http11: bool,
    /// The answer to HEAD has no body (RFC 9110, 9.3.2).
    head_only: bool,
    /// Whether the head is sent.
    begun: bool,
    pending: String,
}

impl<'a> Reply<'a> {
    pub fn new(stream: &'a mut Stream, request: Option<&Request>) -> Reply<'a> {
        Reply {
            stream,
            // A body that nobody reads would be taken for the next request.
            keep: request.is_some_and(|r| r.keep_alive && r.body == Body::Length(0)),
            http11: request.is_some_and(|request| request.http11),
            head_only: request.is_some_and(|request| request.method == "HEAD"),
            begun: false,
            pending: String::new(),
        }
    }

    /// Reads the request's body; the connection is of further use behind it.
    pub fn receive(
        &mut self,
        request: &Request,
        each: impl FnMut(&[u8]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        body::receive(self.stream, request, each)?;
        self.keep = request.keep_alive;
        Ok(())
    }

    /// Adds to the body of a JSON answer; `false` if the client is gone.
    pub fn push(&mut self, text: &str) -> bool {
        self.pending.push_str(text);
        if self.pending.len() < CHUNK {
            return true;
        }
        if !self.begun {
            self.stream.give(LIST_TIME);
            self.keep = self.keep && self.http11;
            let coding = if self.http11 { "Transfer-Encoding: chunked\r\n" } else { "" };
            let head = self.head(200, "application/json", coding);
            self.send(&head);
            self.begun = true;
        }
        self.send_pending("")
    }

    /// Ends the answer, a 200.
    pub fn end(&mut self, content_type: &str) {
        match self.begun {
            true => self.send_pending("0\r\n\r\n"),
            false => self.send_whole(200, content_type, ""),
        };
    }

    /// Answers `{"error":CODE,"message":SENTENCE}`. Where a part of a long answer
    /// is sent already, the connection ends, which a client sees by the missing
    /// last chunk. Returns the result for the log, with what the kernel's tools said.
    pub fn refuse(&mut self, refusal: &Refusal) -> String {
        let (status, code, message) = refusal.parts();
        if self.begun {
            self.keep = false;
            return format!("cut {status} {code}");
        }
        let text = json::string(&message);
        let more = refusal.members();
        self.pending = format!("{{\"error\":\"{code}\",\"message\":{text}{more}}}\n");
        self.send_whole(status, "application/json", &refusal.field());
        let words = if status < 500 { String::new() } else { format!(" '{message}'") };
        format!("{status} {code}{}", printable(words.as_bytes()))
    }

    fn head(&self, status: u16, content_type: &str, fields: &str) -> String {
        format!(
            "HTTP/1.1 {status} {}\r\nDate: {}\r\nContent-Type: {content_type}\r\n\
             Connection: {}\r\n{fields}\r\n",
            names(status).0,
            Utc(clock::wall()).http(),
            if self.keep { "keep-alive" } else { "close" }
        )
    }

    fn send_whole(&mut self, status: u16, content_type: &str, fields: &str) -> bool {
        self.stream.give(ANSWER_TIME);
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
        self.keep = self.keep && sent;
        sent
    }
}
