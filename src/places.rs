//! The places of a listener: how many connections it serves at a time, and who
//! gives way when all are taken.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How many connections that have been cut may be on their way out: a new one
/// does not wait for them, or a burst would overrun the listener's backlog.
const MAX_GOING: usize = 64;
/// How long a new connection waits where more are.
const GOING: Duration = Duration::from_millis(500);
/// How long every connection may stay: a burst of others does not push out one
/// that is about to send its request, but waits.
const STAY: Duration = Duration::from_millis(20);

/// What a connection is about, and since when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It waits for a request.
    Waiting(Instant),
    /// It sends a body, or takes an answer.
    Serving(Instant),
    /// The kernel is at work for it: it does not give way.
    Working,
    /// It has been cut.
    Going,
}

struct Seat {
    /// None once it has been cut.
    socket: Option<Arc<TcpStream>>,
    state: State,
}

#[derive(Default)]
struct Seats {
    taken: BTreeMap<u64, Seat>,
    next: u64,
    /// How many of them have been cut.
    going: usize,
}

impl Seats {
    /// Cuts the one that gives way. A crowd that waits pushes out nobody who is
    /// served, nor a crowd that is served one who is about to send its request. The
    /// error is how long nobody gives way yet, `None` while the kernel is at work
    /// for all.
    fn cut_oldest(&mut self) -> Result<(), Option<Duration>> {
        let (mut waiting, mut serving) = (Vec::new(), Vec::new());
        for seat in self.taken.values_mut() {
            match seat.state {
                State::Waiting(since) => waiting.push((since, seat)),
                State::Serving(since) => serving.push((since, seat)),
                State::Working | State::Going => {}
            }
        }
        let crowd = if waiting.len() >= serving.len() { waiting } else { serving };
        let (since, seat) = crowd.into_iter().min_by_key(|(since, _)| *since).ok_or(None)?;
        match STAY.saturating_sub(since.elapsed()) {
            Duration::ZERO => {}
            young => return Err(Some(young)),
        }
        let _ = seat.socket.take().map(|socket| socket.shutdown(Shutdown::Both));
        seat.state = State::Going;
        self.going = self.going.saturating_add(1);
        Ok(())
    }
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
    /// waited longest for its request gives way or, where more are served than
    /// wait, the one that has been served longest; `None` if the kernel is at work
    /// for all of them.
    pub fn take(self: &Arc<Places>, socket: &Arc<TcpStream>) -> Option<Place> {
        let mut seats = self.lock();
        while seats.taken.len().saturating_sub(seats.going) >= self.most {
            match seats.cut_oldest() {
                Ok(()) => break,
                Err(None) => return None,
                Err(Some(young)) => {
                    drop(seats);
                    thread::sleep(young);
                    seats = self.lock();
                }
            }
        }
        if seats.going > MAX_GOING {
            let crowded = |seats: &mut Seats| seats.going > MAX_GOING;
            let waited = self.left.wait_timeout_while(seats, GOING, crowded);
            let (freed, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                return None;
            }
            seats = freed;
        }
        let number = seats.next;
        seats.next = number.wrapping_add(1);
        let (socket, state) = (Some(socket.clone()), State::Waiting(Instant::now()));
        seats.taken.insert(number, Seat { socket, state });
        Some(Place { places: self.clone(), number })
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Says what the connection is about from now on.
    pub fn is(&self, state: State) {
        if let Some(seat) = self.places.lock().taken.get_mut(&self.number)
            && seat.state != State::Going
        {
            seat.state = state;
        }
    }

    /// Whether it has been cut: then there is nobody to say more to.
    pub fn is_cut(&self) -> bool {
        let seats = self.places.lock();
        seats.taken.get(&self.number).is_none_or(|seat| seat.state == State::Going)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut seats = self.places.lock();
        let seat = seats.taken.remove(&self.number);
        if seat.is_some_and(|seat| seat.state == State::Going) {
            seats.going = seats.going.saturating_sub(1);
            self.places.left.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    #[test]
    fn who_gives_way() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let places = Places::new(3);
        let mut peers = Vec::new();
        let mut taken = Vec::new();
        for _ in 0..3 {
            peers.push(connect());
            taken.push(places.take(&listener.accept().unwrap().0.into()).unwrap());
        }
        // 0 is at work, 1 is served and older than 2, which waits.
        let ago = |seconds| Instant::now() - Duration::from_secs(seconds);
        taken[0].is(State::Working);
        taken[1].is(State::Serving(ago(9)));
        taken[2].is(State::Waiting(ago(1)));
        for gone in [2, 1] {
            let _peer = connect();
            taken.push(places.take(&listener.accept().unwrap().0.into()).unwrap());
            assert_eq!(peers[gone].read(&mut [0]).unwrap(), 0, "{gone} is cut");
            assert!(taken[gone].is_cut() && !taken[0].is_cut());
            taken.last().unwrap().is(State::Working);
        }
        drop(taken.drain(1..3));
        // A new one stays for a moment.
        taken[1].is(State::Waiting(Instant::now()));
        let (_peer, before) = (connect(), Instant::now());
        let newest = places.take(&listener.accept().unwrap().0.into()).unwrap();
        assert!(before.elapsed() >= STAY / 2 && taken[1].is_cut());
        newest.is(State::Working);
        let _peer = connect();
        assert!(places.take(&listener.accept().unwrap().0.into()).is_none(), "all are at work");
    }
}
