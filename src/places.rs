//! The places of a listener: how many connections it serves at a time, and who
//! gives way when all are taken.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a new connection waits for one that gives way to go.
const GOING: Duration = Duration::from_millis(500);

/// What a connection is about, and since when.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum State {
    /// It waits for a request: the first to give way.
    Waiting(Instant),
    /// It sends a body, or takes an answer.
    Serving(Instant),
    /// The kernel is at work for it: it does not give way.
    Working,
    /// It has been cut.
    Going,
}

struct Seat {
    socket: TcpStream,
    state: State,
}

#[derive(Default)]
struct Seats {
    taken: BTreeMap<u64, Seat>,
    next: u64,
}

/// All places of one listener.
pub struct Places {
    seats: Mutex<Seats>,
    left: Condvar,
    most: usize,
}

/// One place, taken until it is dropped.
pub struct Place {
    places: Arc<Places>,
    number: u64,
}

impl Places {
    pub fn new(most: usize) -> Arc<Places> {
        Arc::new(Places { seats: Mutex::default(), left: Condvar::new(), most })
    }

    /// Takes a place for a connection. Where none is free, the one that has
    /// waited longest for its request gives way, then the one that has been
    /// served longest; `None` if the kernel is at work for all of them.
    pub fn take(self: &Arc<Places>, socket: &TcpStream) -> Option<Place> {
        let socket = socket.try_clone().ok()?;
        let mut seats = self.lock();
        if seats.taken.len() >= self.most {
            let oldest = seats.taken.values_mut().min_by_key(|seat| seat.state)?;
            if matches!(oldest.state, State::Waiting(_) | State::Serving(_)) {
                let _ = oldest.socket.shutdown(Shutdown::Both);
                oldest.state = State::Going;
            }
            let full = |seats: &mut Seats| seats.taken.len() >= self.most;
            let waited = self.left.wait_timeout_while(seats, GOING, full);
            let (freed, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                return None;
            }
            seats = freed;
        }
        let number = seats.next;
        seats.next = number.wrapping_add(1);
        seats.taken.insert(number, Seat { socket, state: State::Waiting(Instant::now()) });
        Some(Place { places: self.clone(), number })
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Says what the connection is about from now on.
    pub fn is(&self, state: State) {
        if let Some(seat) = self.places.lock().taken.get_mut(&self.number) {
            if seat.state != State::Going {
                seat.state = state;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().taken.remove(&self.number);
        self.places.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn who_gives_way() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let places = Places::new(3);
        let mut peers = Vec::new();
        let mut taken = Vec::new();
        for _ in 0..3 {
            peers.push(connect());
            taken.push(places.take(&listener.accept().unwrap().0).unwrap());
        }
        // 0 is at work, 1 is served and older than 2, which waits.
        taken[0].is(State::Working);
        taken[1].is(State::Serving(Instant::now() - Duration::from_secs(9)));
        for gone in [2, 1] {
            let _peer = connect();
            let newest = thread::scope(|scope| {
                let socket = listener.accept().unwrap().0;
                let places = places.clone();
                let waiting = scope.spawn(move || places.take(&socket));
                assert_eq!(peers[gone].read(&mut [0]).unwrap(), 0, "{gone} is cut");
                drop(taken.remove(gone));
                waiting.join().unwrap().unwrap()
            });
            newest.is(State::Working);
            taken.push(newest);
        }
        let _peer = connect();
        assert!(places.take(&listener.accept().unwrap().0).is_none(), "all are at work");
    }
}
