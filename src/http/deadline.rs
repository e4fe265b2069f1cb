//! A socket with one deadline.

use std::cell::Cell;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A socket whose reads and writes all end at one deadline. Each wait gets only
/// the time left, so a peer gains nothing by sending byte by byte.
#[derive(Clone, Debug)]
pub struct DeadlineSocket {
    /// Shared with the limiter, which shuts it down to evict the connection.
    pub stream: Arc<TcpStream>,
    /// Shared with the connection, which moves it.
    pub deadline: Rc<Cell<Instant>>,
}

impl DeadlineSocket {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.get().saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }

    /// The next byte, without consuming it; 0 at the end of the stream.
    pub fn peek(&self) -> io::Result<u8> {
        let mut next = [0];
        retry(|| {
            self.stream.set_read_timeout(self.left()?)?;
            self.stream.peek(&mut next)
        })?;
        let [next] = next;
        Ok(next)
    }
}

/// Repeats interrupted calls: while another thread has signals blocked to start a program, the
/// exit of a child interrupts every wait with a time limit (signal(7)).
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

impl Read for DeadlineSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        retry(|| {
            self.stream.set_read_timeout(self.left()?)?;
            (&*self.stream).read(buffer)
        })
    }
}

impl Write for DeadlineSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        retry(|| {
            self.stream.set_write_timeout(self.left()?)?;
            (&*self.stream).write(bytes)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self.stream).flush()
    }
}
