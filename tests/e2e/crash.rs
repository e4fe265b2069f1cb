//! kill -9 at random moments under load. After each restart, every rule that was answered with 200
//! is in the kernel exactly once with its expiry, and the rules of others are unchanged.

use crate::lab::*;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher};
use std::thread;
use std::time::Duration;

/// Kills under load, and kills while rfw starts, for each of the two variants.
const KILLS: usize = 30;
const KILLS_AT_START: usize = 10;

const CLIENTS: u64 = 4;

/// What the responses tell about a rule.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    Absent,
    /// In the kernel with this expiry.
    Present(Option<u64>),
    /// A change got no response; it may have been made or not.
    Unanswered,
}

type Model = BTreeMap<String, Known>;

#[test]
fn kill_9_loses_nothing_that_was_answered() {
    both(|lab| {
        lab.iptables("-A INPUT -s 9.9.9.9 -j DROP");
        lab.iptables("-A FORWARD -s 10.0.0.1 -m comment --comment hers -j ACCEPT");
        lab.ip6tables("-A OUTPUT -d 2001:db8::9 -j DROP");
        let others = lab.others();
        storm(lab, "", KILLS, |when| assert_eq!(lab.others(), others, "{when}"));
    });
}

/// With a state file, the kernel may lose everything, too: a reboot.
#[test]
fn a_reboot_loses_nothing_that_was_answered() {
    both(|lab| {
        for sets in ["", SETS] {
            println!("sets: {sets}");
            sh("rm -f lab/state");
            storm(lab, &format!("state.file = state\n{sets}"), KILLS / 3, |_| {});
            lab.reboot();
        }
    });
}

/// Kills rfw under load, again and again, and compares the responses with the kernel. With a state
/// file, the kernel is emptied before each restart.
fn storm(lab: &Lab, lines: &str, kills: usize, also: impl Fn(&str)) {
    let mut random = Random::new();
    let mut models = vec![Model::new(); CLIENTS as usize];
    let mut rfw = lab.start(&format!("local.server\n{lines}"));
    let known = |models: &[Model]| {
        models.iter().flat_map(Model::values).filter(|k| **k != Known::Unanswered).count()
    };
    let mut kill = 0;
    // A busy machine needs more of them for a significant load.
    while kill < kills || known(&models) <= 20 && kill < 9 * kills {
        let milliseconds = random.below(150);
        models = thread::scope(|scope| {
            let clients = models.into_iter().zip(1..).map(|(model, number)| {
                let random = Random(random.next());
                scope.spawn(move || load(model, number, random))
            });
            let clients: Vec<_> = clients.collect();
            thread::sleep(Duration::from_millis(milliseconds)); // the random moment
            rfw.kill();
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        if lines.contains("state.file") {
            lab.reboot();
        }
        if kill < KILLS_AT_START {
            let mut starting = lab.launch(&[]);
            thread::sleep(Duration::from_millis(random.below(30)));
            starting.kill();
        }
        rfw.restart();
        let when = format!("kill {kill} after {milliseconds} ms");
        check(lab, &models, &when);
        also(&when);
        kill += 1;
    }
    assert!(known(&models) > 20, "the load was too light to mean anything");
}

#[test]
fn a_child_that_outlives_rfw_undoes_no_later_change() {
    both(|lab| {
        lab.stand_in("");
        let mut rfw = lab.start("local.server");
        let slow = "/bin/touch $lab/begun; /bin/sleep 1; $real \"$@\"; /bin/touch $lab/ended; exit";
        lab.stand_in_for_changes(slow);
        let put = "PUT /drop/input/any/1.2.3.4 HTTP/1.1\r\nHost: localhost\r\n\r\n";
        Conn::open().send(put);
        await_true("iptables has begun", SLACK, || lab.dir.join("begun").exists());
        rfw.kill();
        lab.stand_in("");
        rfw.restart();
        assert_eq!(ask("DELETE /drop/input/any/1.2.3.4").status, 200);
        await_true("iptables has ended", SLACK, || lab.dir.join("ended").exists());
        assert_eq!(lab.rules(), [""; 0]);
    });
}

/// Puts and deletes its own rules at random until rfw is gone.
fn load(mut model: Model, client: u64, mut random: Random) -> Model {
    let Ok(mut conn) = Conn::to(LOCAL) else {
        return model;
    };
    loop {
        let (rule, address) = match random.below(12) {
            n @ 0..=7 => ("input", format!("10.0.{client}.{n}")),
            n => ("output", format!("2001:db8::{client}{n:02}")),
        };
        let request = match random.below(4) {
            0 => format!("DELETE /drop/{rule}/any/{address}"),
            1 => format!("PUT /drop/{rule}/any/{address}"),
            _ => format!("PUT /drop/{rule}/any/{address}?expire={}", 1000 + random.below(1000)),
        };
        let was = model.insert(address.clone(), Known::Unanswered);
        match conn.try_ask(&request, "") {
            Ok(answer) if answer.status == 200 && request.starts_with("DELETE") => {
                model.insert(address, Known::Absent);
            }
            Ok(answer) if answer.status == 200 => {
                model.insert(address, Known::Present(answer.field("expires").parse().ok()));
            }
            Ok(answer) => panic!("{request} (was {was:?}): {answer:?}"),
            Err(_) => return model,
        }
    }
}

/// Compares the responses with the kernel, where each rule of rfw occurs at most once.
fn check(lab: &Lab, models: &[Model], when: &str) {
    println!("{when}"); // for the reader of a failure
    let kernel = lab.kept();
    // A set shows the time left in whole seconds.
    let exact = lab.entries().is_empty();
    for (address, known) in models.iter().flatten() {
        let found = kernel.get(address).map_or(Known::Absent, |expires| Known::Present(*expires));
        let near = match (*known, found) {
            (Known::Present(Some(a)), Known::Present(Some(b))) => !exact && a.abs_diff(b) <= 3,
            _ => false,
        };
        assert!(
            near || *known == Known::Unanswered || *known == found,
            "{when}: {address} {known:?}, is {found:?}"
        );
    }
    let strange =
        kernel.keys().find(|address| !models.iter().any(|model| model.contains_key(*address)));
    assert_eq!(strange, None, "{when}");
}

/// xorshift, seeded by the standard library's hash keys.
pub struct Random(u64);

impl Random {
    pub fn new() -> Random {
        let seed = std::hash::RandomState::new().build_hasher().finish() | 1;
        println!("seed {seed}");
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
