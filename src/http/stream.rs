//! A connection, plain or TLS, of which every wait has one common deadline.

use super::refusal::Refusal;
use super::request::{Request, head_length};
use super::timed::Timed;
use super::tls::{self, Acceptor, Session};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// How long a connection lingers for a peer that still sends, so that the
/// answer is not lost to a reset (RFC 9112, 9.6), and how much it may send.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 256 * 1024;

const TIMEOUT: Refusal = Refusal::Http(408, "The request did not come in time.");

enum Io {
    Plain(Timed),
    Tls(Box<Session>),
}

/// One connection with what was received ahead of its use.
pub struct Stream {
    io: Io,
    received: Vec<u8>,
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
        Ok(Stream { io, received: Vec::new() })
    }

    /// Sets the deadline of everything that follows.
    pub fn give(&mut self, time: Duration) {
        let now = Instant::now();
        self.timed().deadline = now.checked_add(time).unwrap_or(now);
    }

    /// Reads the next request; `None` if the peer is gone, or was silent.
    pub fn request(&mut self) -> Option<Result<Request, Refusal>> {
        loop {
            match head_length(&self.received) {
                Ok(None) => {}
                Ok(Some(length)) => {
                    let head: Vec<u8> = self.received.drain(..length).collect();
                    return Some(Request::parse(&head));
                }
                Err(refusal) => return Some(Err(refusal)),
            }
            let mut buffer = [0; 4096];
            match self.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.received.extend(buffer.iter().take(count)),
                Err(error) if is_timeout(&error) && !self.received.is_empty() => {
                    return Some(Err(TIMEOUT));
                }
                Err(_) => return None,
            }
        }
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

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.io {
            Io::Plain(timed) => timed.read(buffer),
            Io::Tls(session) => session.read(buffer),
        }
    }

    fn timed(&mut self) -> &mut Timed {
        match &mut self.io {
            Io::Plain(timed) => timed,
            Io::Tls(session) => &mut session.sock,
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}
