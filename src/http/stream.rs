//! A connection, plain or TLS, of which every wait has one common deadline.

use super::refusal::Refusal;
use super::request::{Request, head_length};
use super::timed::Timed;
use super::tls::{self, Acceptor, Session};
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// How long a connection lingers for a peer that still sends, so that the
/// answer is not lost to a reset (RFC 9112, 9.6), and how much it may send.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 256 * 1024;

/// How many bytes are received at a time.
const PIECE: usize = 8 * 1024;

const TIMEOUT: Refusal = Refusal::Http(408, "The request did not come in time.");

enum Io {
    Plain(Timed),
    Tls(Box<Session>),
}

/// One connection with what was received ahead of its use.
pub struct Stream {
    io: Io,
    received: Vec<u8>,
    /// How much of that is used already.
    used: usize,
}

impl Stream {
    /// Takes a connection; with an acceptor it speaks TLS.
    pub fn new(socket: TcpStream, acceptor: Option<&Acceptor>) -> io::Result<Stream> {
        socket.set_nodelay(true)?;
        let timed = Timed { socket, deadline: Instant::now() };
        let io = match acceptor {
            None => Io::Plain(timed),
            Some(acceptor) => Io::Tls(Box::new(acceptor.session(timed)?)),
        };
        Ok(Stream { io, received: Vec::new(), used: 0 })
    }

    /// Sets the deadline of everything that follows.
    pub fn give(&mut self, time: Duration) {
        let now = Instant::now();
        self.timed().deadline = now.checked_add(time).unwrap_or(now);
    }

    /// Reads the next request; `None` if the peer is gone, or was silent.
    pub fn request(&mut self) -> Option<Result<Request, Refusal>> {
        self.received.drain(..mem::take(&mut self.used));
        loop {
            match head_length(&self.received) {
                Ok(None) => {}
                Ok(Some(length)) => {
                    self.used = length;
                    return Some(Request::parse(self.received.get(..length)?));
                }
                Err(refusal) => return Some(Err(refusal)),
            }
            match self.receive() {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if is_timeout(&error) && !self.received.is_empty() => {
                    return Some(Err(TIMEOUT));
                }
                Err(_) => return None,
            }
        }
    }

    /// Whether bytes behind the last request have come.
    pub fn has_received(&self) -> bool {
        self.used < self.received.len()
    }

    /// The bytes that come next, at least one unless the peer has ended.
    pub fn fill(&mut self) -> io::Result<&[u8]> {
        if !self.has_received() {
            self.received.clear();
            self.used = 0;
            self.receive()?;
        }
        Ok(self.received.get(self.used..).unwrap_or_default())
    }

    /// So many of them are used.
    pub fn consume(&mut self, count: usize) {
        self.used = self.used.saturating_add(count);
    }

    pub fn send(&mut self, text: &str) -> io::Result<()> {
        match &mut self.io {
            Io::Plain(timed) => timed.write_all(text.as_bytes()),
            Io::Tls(session) => session.write_all(text.as_bytes()).and_then(|()| session.flush()),
        }
    }

    /// Closes the connection so that the peer can still read the answer.
    pub fn close(mut self) {
        self.give(LINGER);
        if let Io::Tls(session) = &mut self.io {
            tls::close(session);
        }
        let timed = self.timed();
        if timed.socket.shutdown(Shutdown::Write).is_ok() {
            let _ = io::copy(&mut timed.take(LINGER_BYTES), &mut io::sink());
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut buffer = [0; PIECE];
        let count = match &mut self.io {
            Io::Plain(timed) => timed.read(&mut buffer)?,
            Io::Tls(session) => session.read(&mut buffer)?,
        };
        self.received.extend(buffer.iter().take(count));
        Ok(count)
    }

    fn timed(&mut self) -> &mut Timed {
        match &mut self.io {
            Io::Plain(timed) => timed,
            Io::Tls(session) => &mut session.sock,
        }
    }
}

pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}
