//! A connection, plain or TLS, with one deadline for all its waits.

use super::api_error::ApiError;
use super::deadline::DeadlineSocket;
use super::request::{Request, head_length};
use super::tls::{Acceptor, Session};
use crate::clock;
use std::cell::Cell;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a closed connection reads on if the peer still sends, so that a reset does not destroy
/// the response (RFC 9112, 9.6).
const LINGER: Duration = Duration::from_secs(1);

/// How many bytes are read at a time.
const PIECE: usize = 8192;

const PLAIN_HTTP: ApiError =
    ApiError::Http(400, "This port speaks HTTPS; use https:// instead of http://.");
const TIMEOUT: ApiError = ApiError::Http(408, "The request did not arrive in time.");

pub(super) enum Io {
    Plain(DeadlineSocket),
    Tls(Box<Session>),
}

impl Read for Io {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Io::Plain(socket) => socket.read(buffer),
            Io::Tls(session) => session.read(buffer),
        }
    }
}

/// One connection and its receive buffer.
pub struct HttpStream {
    pub(super) input: BufReader<Io>,
    pub(super) deadline: Rc<Cell<Instant>>,
}

impl HttpStream {
    /// Wraps a socket, in TLS if there is an acceptor.
    pub fn new(stream: Arc<TcpStream>, acceptor: Option<&Acceptor>) -> io::Result<HttpStream> {
        stream.set_nodelay(true)?;
        let deadline = Rc::new(Cell::new(Instant::now()));
        let socket = DeadlineSocket { stream, deadline: deadline.clone() };
        let io = match acceptor {
            None => Io::Plain(socket),
            Some(acceptor) => Io::Tls(Box::new(acceptor.session(socket)?)),
        };
        Ok(HttpStream { input: BufReader::with_capacity(PIECE, io), deadline })
    }

    /// Sets the deadline of all reads and writes that follow.
    pub fn set_deadline(&self, time: Duration) {
        self.deadline.set(clock::after(time));
    }

    /// Reads the next request; fails if the peer is gone or silent, or TLS fails.
    pub fn request(&mut self) -> io::Result<Result<Request, ApiError>> {
        if self.is_plain_http()? {
            return Ok(Err(PLAIN_HTTP));
        }
        let mut head = Vec::new();
        loop {
            let bytes = match self.input.fill_buf() {
                Ok([]) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => bytes,
                Err(error) if is_timeout(&error) && !head.is_empty() => return Ok(Err(TIMEOUT)),
                Err(error) => return Err(error),
            };
            let (before, count) = (head.len(), bytes.len());
            head.extend(bytes);
            match head_length(&head) {
                Ok(None) => self.input.consume(count),
                Ok(Some(length)) => {
                    self.input.consume(length.saturating_sub(before));
                    head.truncate(length);
                    return Ok(Request::parse(&head));
                }
                Err(error) => return Ok(Err(error)),
            }
        }
    }

    /// Whether the peer's first byte is a letter, as in HTTP, and not a TLS record (22): then the
    /// connection continues without TLS.
    fn is_plain_http(&mut self) -> io::Result<bool> {
        let io = self.input.get_mut();
        let Io::Tls(session) = io else { return Ok(false) };
        let is_plain = session.conn.is_handshaking() && session.sock.peek()?.is_ascii_alphabetic();
        if is_plain {
            *io = Io::Plain(session.sock.clone());
        }
        Ok(is_plain)
    }

    /// Whether bytes after the last request have been received.
    pub fn has_received(&self) -> bool {
        !self.input.buffer().is_empty()
    }

    pub fn send(&mut self, text: &str) -> io::Result<()> {
        match self.input.get_mut() {
            Io::Plain(socket) => socket.write_all(text.as_bytes()),
            Io::Tls(session) => session.write_all(text.as_bytes()).and_then(|()| session.flush()),
        }
    }

    /// Closes the connection such that the peer can still read the response.
    pub fn close(mut self) {
        self.set_deadline(LINGER);
        let socket = match self.input.get_mut() {
            Io::Plain(socket) => socket,
            Io::Tls(session) => {
                // With close_notify, the peer can tell the end from a cut (RFC 8446, 6.1).
                session.conn.send_close_notify();
                let _ = session.conn.complete_io(&mut session.sock);
                &mut session.sock
            }
        };
        if socket.stream.shutdown(Shutdown::Write).is_ok() {
            let _ = io::copy(socket, &mut io::sink());
        }
    }
}

pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

/// The client's end of a connection, and the server's.
#[cfg(test)]
pub fn pair() -> (TcpStream, HttpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let stream = HttpStream::new(listener.accept().unwrap().0.into(), None).unwrap();
    stream.set_deadline(Duration::from_secs(20));
    (client, stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(stream: &mut HttpStream) -> String {
        match stream.request() {
            Err(_) => "none".into(),
            Ok(Err(error)) => error.describe().0.to_string(),
            Ok(Ok(request)) => request.path,
        }
    }

    #[test]
    fn pipelined_requests() {
        let (mut client, mut stream) = pair();
        client.write_all(b"GET /a HTTP/1.0\r\n\r\nGET /b HTTP/1.0\r\n\r\n").unwrap();
        assert_eq!(path(&mut stream), "/a");
        assert!(stream.has_received());
        assert_eq!(path(&mut stream), "/b");
        assert!(!stream.has_received());
        client.write_all(b"GET /c HTTP").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(path(&mut stream), "none");

        let (mut client, mut stream) = pair();
        client.write_all(b"GET\n").unwrap();
        assert_eq!(path(&mut stream), "400");
        // Longer than one read.
        let (mut client, mut stream) = pair();
        let long = "x".repeat(PIECE - 16);
        write!(client, "GET /{long} HTTP/1.0\r\nX: {long}\r\n\r\n").unwrap();
        assert_eq!(path(&mut stream).len(), PIECE - 15);
    }

    #[test]
    fn a_late_client_gets_408_unless_it_sent_nothing() {
        for (begun, expected) in [("GET /", "408"), ("", "none")] {
            let (mut client, mut stream) = pair();
            client.write_all(begun.as_bytes()).unwrap();
            if !begun.is_empty() {
                stream.input.fill_buf().unwrap(); // in time, however busy the machine is
            }
            stream.set_deadline(Duration::from_millis(100));
            assert_eq!(path(&mut stream), expected);
        }
        for (kind, timeout) in [
            (ErrorKind::TimedOut, true),
            (ErrorKind::WouldBlock, true),
            (ErrorKind::ConnectionReset, false),
        ] {
            assert_eq!(is_timeout(&kind.into()), timeout, "{kind}");
        }
    }

    #[test]
    fn bytes_after_a_head() {
        let (mut client, mut stream) = pair();
        client.write_all(b"PUT / HTTP/1.0\r\n\r\nabcd").unwrap();
        assert_eq!(path(&mut stream), "/");
        assert_eq!(stream.input.fill_buf().unwrap(), b"abcd");
        stream.input.consume(3);
        assert_eq!(stream.input.fill_buf().unwrap(), b"d");
        stream.input.consume(1);
        client.write_all(b"ef").unwrap();
        assert_eq!(stream.input.fill_buf().unwrap(), b"ef");
        stream.input.consume(2);
        client.write_all(b"GET /next HTTP/1.0\r\n\r\n").unwrap();
        assert_eq!(path(&mut stream), "/next");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.input.fill_buf().unwrap(), b"");
    }

    /// If bytes are unread at close, the kernel resets the connection, which
    /// destroys the response.
    #[test]
    fn the_last_response_arrives() {
        let (mut client, mut stream) = pair();
        client.write_all(&[b'x'; 100_000]).unwrap();
        stream.send("answer").unwrap();
        stream.close();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!((&*answer, client.take_error().unwrap().is_none()), ("answer", true));
    }
}
