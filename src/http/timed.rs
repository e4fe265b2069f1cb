//! A socket under one deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A socket whose reads and writes all end at a deadline. Each wait is armed
/// with what is left of it, so a peer gains nothing by sending byte by byte.
#[derive(Debug)]
pub struct Timed {
    /// Shared with who may cut it.
    pub socket: Arc<TcpStream>,
    pub deadline: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }

    /// A child that ends while another thread has signals blocked, because it starts a program,
    /// interrupts a wait that has a time limit (signal(7)): that is no failure.
    fn retry(
        &mut self,
        mut work: impl FnMut(&mut Timed) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            match work(self) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.retry(|timed| {
            timed.socket.set_read_timeout(timed.left()?)?;
            (&*timed.socket).read(buffer)
        })
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.retry(|timed| {
            timed.socket.set_write_timeout(timed.left()?)?;
            (&*timed.socket).write(bytes)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self.socket).flush()
    }
}
