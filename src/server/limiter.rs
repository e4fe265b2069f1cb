//! How many connections are active at a time, and which one is evicted if more need a slot.
//!
//! A connection needs a slot to be served, and a second one while rfw receives a list from it or sends
//! it a long listing. If all slots are taken, the connection that has kept rfw waiting longest is evicted:
//! waiting for a request, for the next 16 KiB of a body, or for the client to accept the next
//! 16 KiB of a response. It is not evicted before [`Limits::patience`] has passed, nor while rfw
//! works for it. Connections of an address that holds more than its share, a quarter of the slots,
//! are evicted before all others; a connection that exceeds the share of its address evicts no others
//! while rfw waits for one of these. Of the lists and listings that wait, those of the address with the
//! fewest slots go first; connections wait in order of arrival, because a listener admits one at a
//! time. While others wait for a slot, a connection is closed after its response, so that every
//! client gets a turn ([`ConnectionLimiter::is_wanted`]). A connection that has waited for
//! [`MAX_WAIT`] is refused.

use crate::clock;
use crate::mutex::lock;
use crate::rule::net::Net;
use std::collections::HashMap;
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a connection waits for a slot.
pub const MAX_WAIT: Duration = Duration::from_secs(5);
/// The patience with an address that holds more than its share: from connecting to its request, a
/// client needs some milliseconds.
const MIN_PATIENCE: Duration = Duration::from_millis(20);
/// How many bytes of a body or response count as progress; single bytes do not.
const PIECE: usize = 16 * 1024;

pub struct Limits {
    pub slots: usize,
    /// How many evicted connections may still be closing when the next one is admitted.
    pub evicting: usize,
    /// How long a client may keep rfw waiting before it can be evicted.
    pub patience: Duration,
    /// How often a waiting connection checks whether another one can be evicted.
    pub poll: Duration,
}

enum State {
    /// Since when rfw has waited for the client, and how many bytes of the next piece it has moved.
    Waiting(Instant, usize),
    /// The client waits for rfw, initially for a thread.
    Working,
    Evicted,
}

/// A connection, with the state that all its slots share.
pub struct Client {
    pub ip: IpAddr,
    /// What counts as its address.
    source: Net,
    pub socket: Arc<TcpStream>,
    state: Mutex<State>,
}

#[derive(Default)]
struct Table {
    /// The connections that have a slot, or were evicted from one and are still closing.
    holders: Vec<Arc<Client>>,
    /// The waiting connections, in order of arrival, each with the thread that waits.
    queue: Vec<(Arc<Client>, Thread)>,
}

pub struct ConnectionLimiter {
    limits: Limits,
    table: Mutex<Table>,
}

/// A slot, released when it is dropped.
pub struct Slot {
    limiter: Arc<ConnectionLimiter>,
    client: Arc<Client>,
}

impl ConnectionLimiter {
    pub fn new(limits: Limits) -> Arc<ConnectionLimiter> {
        Arc::new(ConnectionLimiter { limits, table: Mutex::default() })
    }

    /// Waits for a slot; `None` after the deadline, or if the client is evicted meanwhile.
    pub fn acquire(self: &Arc<Self>, client: &Arc<Client>, deadline: Instant) -> Option<Slot> {
        let mut table = lock(&self.table);
        table.queue.push((client.clone(), thread::current()));
        let has_slot = loop {
            if table.make_room(client, &self.limits) {
                break true;
            }
            if Instant::now() >= deadline || client.is_evicted() {
                break false;
            }
            drop(table);
            thread::park_timeout(self.limits.poll);
            table = lock(&self.table);
        };
        table.queue.retain(|(waiting, _)| !Arc::ptr_eq(waiting, client));
        if has_slot {
            client.update(|state| *state = State::Working);
            table.holders.push(client.clone());
        }
        table.wake_next();
        has_slot.then(|| Slot { limiter: self.clone(), client: client.clone() })
    }

    /// Whether connections wait for a slot, or an evicted one is still closing.
    pub fn is_wanted(&self) -> bool {
        let table = lock(&self.table);
        !table.queue.is_empty() || table.holders.iter().any(|holder| holder.is_evicted())
    }
}

impl Table {
    /// The first in the queue from the address that holds the fewest slots.
    fn next(&self) -> Option<&(Arc<Client>, Thread)> {
        let held = |(waiting, _): &&(Arc<Client>, Thread)| self.held_by(waiting.source);
        // Usually the search ends at once.
        let first_without = self.queue.iter().find(|waiting| held(waiting) == 0);
        first_without.or_else(|| self.queue.iter().min_by_key(held))
    }

    /// Only this one: to wake all takes longer than to serve them.
    fn wake_next(&self) {
        if let Some((_, thread)) = self.next() {
            thread.unpark();
        }
    }

    /// Whether there is a slot, perhaps by eviction, and this client is next.
    fn make_room(&self, client: &Arc<Client>, limits: &Limits) -> bool {
        if self.next().is_some_and(|(next, _)| !Arc::ptr_eq(next, client)) {
            return false;
        }
        if self.active() >= limits.slots {
            self.evict_for(client.source, limits);
        }
        self.active() < limits.slots
            && self.holders.len() < limits.slots.saturating_add(limits.evicting)
    }

    /// Evicts the connection that has kept rfw waiting longest, those of greedy addresses first.
    fn evict_for(&self, newcomer: Net, limits: &Limits) {
        let now = Instant::now();
        let mut held = HashMap::with_capacity(self.holders.len());
        for source in self.holders.iter().map(|holder| holder.source).chain([newcomer]) {
            let count = held.entry(source).or_insert(0_usize);
            *count = count.saturating_add(1);
        }
        let count_of = |source| held.get(&source).copied().unwrap_or_default();
        let (share, own) = (limits.slots.div_ceil(4), count_of(newcomer));
        let (mut victim, mut waits_for_greedy) = (None, false);
        for (at, holder) in self.holders.iter().enumerate() {
            let State::Waiting(since, _) = *lock(&holder.state) else { continue };
            let (count, waited) = (count_of(holder.source), now.saturating_duration_since(since));
            let is_greedy = count > share;
            waits_for_greedy |= is_greedy;
            let is_hasty = is_greedy && count > own;
            let patience = if is_hasty { MIN_PATIENCE } else { limits.patience };
            if waited >= patience {
                victim = victim.max(Some((is_greedy, waited, at)));
            }
        }
        let spares_others = own > share && waits_for_greedy;
        let victim = victim.filter(|(is_greedy, ..)| *is_greedy || !spares_others);
        if let Some(victim) = victim.and_then(|(.., at)| self.holders.get(at)) {
            victim.update(|state| {
                // Unless it has just sent or received something.
                if matches!(state, State::Waiting(since, _) if since.elapsed() >= MIN_PATIENCE) {
                    let _ = victim.socket.shutdown(Shutdown::Both);
                    *state = State::Evicted;
                }
            });
        }
    }

    /// How many holders are not evicted.
    fn active(&self) -> usize {
        self.holders.iter().filter(|holder| !holder.is_evicted()).count()
    }

    fn held_by(&self, source: Net) -> usize {
        self.holders.iter().filter(|holder| holder.source == source).count()
    }
}

impl Client {
    pub fn new(ip: IpAddr, socket: TcpStream) -> Arc<Client> {
        Arc::new(Client {
            ip,
            source: Net::source(ip),
            socket: socket.into(),
            state: Mutex::new(State::Working),
        })
    }

    /// Waits for a slot to transfer a list, at most for [`MAX_WAIT`].
    pub fn acquire(self: &Arc<Client>, limiter: &Arc<ConnectionLimiter>) -> Option<Slot> {
        let slot = limiter.acquire(self, clock::after(MAX_WAIT))?;
        self.start_patience();
        Some(slot)
    }

    /// From now on rfw waits for the client.
    pub fn start_patience(&self) {
        self.update(|state| *state = State::Waiting(Instant::now(), 0));
    }

    /// Counts further bytes that the client has sent or received.
    pub fn progress(&self, bytes: usize) {
        self.update(|state| match state {
            State::Waiting(_, moved) if moved.saturating_add(bytes) < PIECE => {
                *moved = moved.saturating_add(bytes);
            }
            _ => *state = State::Waiting(Instant::now(), 0),
        });
    }

    /// Does something that the client waits for; meanwhile it is not evicted.
    pub fn work<T>(&self, work: impl FnOnce() -> T) -> T {
        self.update(|state| *state = State::Working);
        let result = work();
        self.start_patience();
        result
    }

    /// Waits for the client in the middle of such work.
    pub fn wait<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.start_patience();
        let result = wait();
        self.update(|state| *state = State::Working);
        result
    }

    /// Whether the connection was evicted: its socket is shut down.
    pub fn is_evicted(&self) -> bool {
        matches!(*lock(&self.state), State::Evicted)
    }

    /// Changes the state, except that an evicted connection remains evicted.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        if !matches!(*state, State::Evicted) {
            change(&mut state);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut table = lock(&self.limiter.table);
        table.holders.retain(|holder| !Arc::ptr_eq(holder, &self.client));
        table.wake_next();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;
    use std::thread;

    /// Longer than a test takes on a busy machine.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Connections that hold slots, with the clients' sockets.
    struct Test {
        listener: TcpListener,
        limiter: Arc<ConnectionLimiter>,
        held: Vec<(Slot, TcpStream)>,
    }

    impl Test {
        fn new(slots: usize, evicting: usize) -> Test {
            let poll = Duration::from_millis(10);
            let limiter =
                ConnectionLimiter::new(Limits { slots, evicting, patience: PATIENCE, poll });
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            Test { listener, limiter, held: Vec::new() }
        }

        /// One whose four slots these addresses hold; rfw has waited for each a little less long than for
        /// the one before.
        fn full(holders: [u32; 4], millis: u64) -> Test {
            let mut test = Test::new(4, 1);
            for (at, n) in holders.into_iter().enumerate() {
                assert!(test.acquire(n, Duration::ZERO));
                test.set_waited(at, millis - at as u64);
            }
            test
        }

        /// Connects from 0.0.0.N and waits for a slot, at most for `wait`.
        fn acquire(&mut self, n: u32, wait: Duration) -> bool {
            let client = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
            let socket = self.listener.accept().unwrap().0;
            let accepted = Client::new(IpAddr::V4(n.into()), socket);
            let slot = self.limiter.acquire(&accepted, Instant::now() + wait);
            slot.map(|slot| self.held.push((slot, client))).is_some()
        }

        fn client(&self, at: usize) -> &Arc<Client> {
            &self.held[at].0.client
        }

        /// Sets for how long rfw has waited for a client.
        fn set_waited(&self, at: usize, millis: u64) {
            let since = Instant::now() - Duration::from_millis(millis);
            self.client(at).update(|state| *state = State::Waiting(since, 0));
        }

        fn evicted(&self) -> Vec<usize> {
            (0..self.held.len()).filter(|at| self.client(*at).is_evicted()).collect()
        }
    }

    #[test]
    fn the_client_that_keeps_rfw_waiting_longest_is_evicted() {
        // How long rfw has waited for each holder (0: it works for it), and which one is evicted.
        let table: [(&[u64], Option<usize>); 4] = [
            (&[30_000, 50_000, 40_000], Some(1)),
            (&[0, 0, 30_000], Some(2)),
            (&[500, 600, 700], None),
            (&[0, 0, 0], None),
        ];
        for (waited, victim) in table {
            let mut test = Test::new(3, 1);
            for (at, millis) in waited.iter().enumerate() {
                assert!(test.acquire(at as u32, Duration::ZERO));
                if *millis > 0 {
                    test.set_waited(at, *millis);
                }
            }
            assert_eq!(test.acquire(9, Duration::ZERO), victim.is_some(), "{waited:?}");
            assert_eq!(test.evicted(), Vec::from_iter(victim), "{waited:?}");
            if let Some(victim) = victim {
                assert_eq!(test.held[victim].1.read(&mut [0]).unwrap(), 0, "its socket is shut");
            }
        }
    }

    #[test]
    fn every_address_has_its_share() {
        // The addresses of four holders, each of which has kept rfw waiting for about 100 ms; the
        // newcomer's address; which holder is evicted.
        let table: [([u32; 4], u32, Option<usize>); 4] = [
            ([1, 2, 2, 2], 3, Some(1)),
            ([1, 2, 2, 2], 1, Some(1)),
            ([1, 1, 2, 2], 1, None),
            ([1, 2, 2, 2], 2, None),
        ];
        for (holders, newcomer, victim) in table {
            let mut test = Test::full(holders, 100);
            assert_eq!(test.acquire(newcomer, Duration::ZERO), victim.is_some(), "{holders:?}");
            assert_eq!(test.evicted(), Vec::from_iter(victim), "{holders:?} {newcomer}");
        }
    }

    /// Otherwise, one address without credentials could keep all others out.
    #[test]
    fn an_address_that_exceeds_its_share_evicts_no_other() {
        for (newcomer, victim) in [(2, 1), (3, 1), (1, 0)] {
            let mut test = Test::full([1, 2, 2, 2], 40_000);
            assert!(test.acquire(newcomer, Duration::ZERO));
            assert_eq!(test.evicted(), [victim], "{newcomer}");
        }
        let mut test = Test::full([1, 2, 3, 4], 40_000);
        assert!(test.acquire(3, Duration::ZERO));
        assert_eq!(test.evicted(), [2], "its own");
        // A client with many changes in progress is not kept waiting by idle ones.
        let mut test = Test::new(4, 1);
        assert!([1, 2, 2, 2].into_iter().all(|n| test.acquire(n, Duration::ZERO)));
        test.set_waited(0, 40_000);
        assert!(test.acquire(2, Duration::ZERO));
        assert_eq!(test.evicted(), [0]);
    }

    /// First come, first served, but an address that holds a slot comes after one that holds none.
    #[test]
    fn every_waiting_connection_gets_a_turn() {
        let mut test = Test::new(2, 0);
        assert!(test.acquire(1, Duration::ZERO) && test.acquire(1, Duration::ZERO));
        assert!(!test.limiter.is_wanted());
        let (limiter, order) = (test.limiter.clone(), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for (at, n) in [1, 2, 3].into_iter().enumerate() {
                let (limiter, order) = (&limiter, &order);
                let socket = test.client(0).socket.try_clone().unwrap();
                scope.spawn(move || {
                    let deadline = Instant::now() + Duration::from_secs(20);
                    let client = Client::new(IpAddr::V4(n.into()), socket);
                    let slot = limiter.acquire(&client, deadline).unwrap();
                    order.lock().unwrap().push(n);
                    drop(slot);
                });
                while lock(&limiter.table).queue.len() <= at {
                    thread::yield_now();
                }
            }
            assert!(test.limiter.is_wanted());
            // With its other slot, this address comes after the others.
            test.held.pop();
        });
        assert_eq!(*order.lock().unwrap(), [2, 3, 1]);
    }

    #[test]
    fn bytes_are_progress_piece_by_piece() {
        for (pieces, is_progress) in
            [(&[PIECE - 1][..], false), (&[PIECE - 1, 1], true), (&[PIECE], true)]
        {
            let mut test = Test::new(1, 1);
            assert!(test.acquire(1, Duration::ZERO));
            test.set_waited(0, 30_000);
            pieces.iter().for_each(|bytes| test.client(0).progress(*bytes));
            assert_eq!(test.acquire(2, Duration::ZERO), !is_progress, "{pieces:?}");
        }
    }

    #[test]
    fn evicted_connections_are_counted_until_they_leave() {
        let mut test = Test::new(1, 0);
        assert!(test.acquire(1, Duration::ZERO));
        test.set_waited(0, 30_000);
        // With `evicting: 0`, the newcomer is admitted only after the evicted connection has closed.
        assert!(!test.acquire(2, Duration::ZERO));
        assert_eq!(test.evicted(), [0]);
        assert!(test.limiter.is_wanted());
        drop(test.held.remove(0));
        assert!(test.acquire(2, Duration::ZERO));
        assert!(!test.limiter.is_wanted() && lock(&test.limiter.table).holders.len() == 1);
        // An evicted connection stops waiting for a slot of another limiter.
        let other = Test::new(0, 0); // it has none
        test.set_waited(0, 30_000);
        assert!(!test.acquire(3, Duration::ZERO));
        let before = Instant::now();
        assert!(test.client(0).acquire(&other.limiter).is_none());
        assert!(before.elapsed() < MAX_WAIT && lock(&other.limiter.table).queue.is_empty());
    }

    /// A connection is not evicted before it is served; with a slot for a transfer, it is served.
    #[test]
    fn patience_begins_when_a_connection_is_served() {
        let mut test = Test::new(1, 1);
        assert!(test.acquire(1, Duration::ZERO));
        let is_working = || matches!(*lock(&test.client(0).state), State::Working);
        assert!(is_working());
        let _transfer = test.client(0).acquire(&Test::new(1, 1).limiter).unwrap();
        assert!(!is_working());
    }

    #[test]
    fn a_connection_is_not_evicted_during_work() {
        let mut test = Test::new(1, 1);
        assert!(test.acquire(1, Duration::ZERO));
        test.set_waited(0, 30_000);
        let slot = test.held.remove(0).0;
        assert!(slot.client.work(|| !test.acquire(2, Duration::ZERO)));
        assert!(!test.acquire(2, Duration::ZERO), "patience begins after the work");
        // In between, rfw may wait for the client.
        slot.client.work(|| {
            slot.client.wait(|| assert!(matches!(*lock(&slot.client.state), State::Waiting(..))));
            assert!(matches!(*lock(&slot.client.state), State::Working));
        });
    }
}
