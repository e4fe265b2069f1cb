//! Compatibility with clients of rfw 0.2.2: the same requests to both versions, and the reason for
//! every difference.

use crate::lab::*;
use std::collections::BTreeMap;

/// Each request; what rfw 0.2.2 did, with Python 2.7.18 and iptables-nft 1.8.9: its response, and the
/// rules that appeared (`+`) or disappeared (`-`); the same for this rfw; why they differ. The requests
/// are sent in this order, to an empty kernel, with `non.restful`, and 192.0.2.1 and 10.5.0.0/16 in
/// white.list. The rule for 127.0.0.1 was removed by hand, because 0.2.2 no longer responded.
const REQUESTS: &str = "\
PUT /drop/input/eth0/1.2.3.4
  before: 200 +INPUT -s 1.2.3.4/32 -j DROP
  now:    200 inserted +INPUT -s 1.2.3.4/32 -i eth0 -j DROP note
  reason: 0.2.2 never passed the interface to iptables; this host has no eth0, which the note says
PUT /drop/input/eth0/1.2.3.4
  before: 200
  now:    200 exists note
  reason: this host has no eth0, which the note says
DELETE /drop/input/eth0/1.2.3.4
  before: 200 -INPUT -s 1.2.3.4/32 -j DROP
  now:    200 deleted -INPUT -s 1.2.3.4/32 -i eth0 -j DROP note
  reason: it is the rule for eth0
DELETE /drop/input/eth0/1.2.3.4
  before: 200
  now:    200 absent note
  reason: this host has no eth0, which the note says
PUT /drop/input/any/1.2.3.4
  before: 200 +INPUT -s 1.2.3.4/32 -j DROP
  now:    200 inserted +INPUT -s 1.2.3.4/32 -j DROP
PUT /DROP/Input/ANY/1.2.3.5
  before: 200 +INPUT -s 1.2.3.5/32 -j DROP
  now:    400 bad_interface
  reason: the names of interfaces keep their case, and 'ANY' is not 'any'
PUT /drop/input/lo/1.2.3.4
  before: 200 +INPUT -s 1.2.3.4/32 -j DROP
  now:    200 inserted +INPUT -s 1.2.3.4/32 -i lo+ -j DROP
  reason: 0.2.2 added the same rule again, for it never passed the interface to iptables
PUT /reject/output/any/9.9.9.9
  before: 200 +OUTPUT -d 9.9.9.9/32 -j REJECT
  now:    200 inserted +OUTPUT -d 9.9.9.9/32 -j REJECT
PUT /accept/output/any/192.168.0.0/24
  before: 200 +OUTPUT -d 192.168.0.0/24 -j ACCEPT
  now:    200 inserted +OUTPUT -d 192.168.0.0/24 -j ACCEPT
PUT /accept/forward/ppp/1.2.3.0/24/eth0/5.5.5.5
  before: 200 +FORWARD -s 1.2.3.0/24 -d 5.5.5.5/32 -j ACCEPT
  now:    200 inserted +FORWARD -s 1.2.3.0/24 -d 5.5.5.5/32 -i ppp+ -o eth0 -j ACCEPT note
  reason: 0.2.2 never passed the interfaces to iptables; this host has no such interfaces: a note
PUT /drop/forward/any/1.2.3.4
  before: 200 +FORWARD -s 1.2.3.4/32 -j DROP
  now:    200 inserted +FORWARD -s 1.2.3.4/32 -j DROP
PUT /drop/forward/any/0.0.0.0/any/1.2.3.4
  before: 200 +FORWARD -s 0.0.0.0/32 -d 1.2.3.4/32 -j DROP
  now:    200 inserted +FORWARD -d 1.2.3.4/32 -j DROP
  reason: 0.0.0.0 is any address in FORWARD; the rule of 0.2.2 matched no packet
PUT /drop/forward/any/0.0.0.0
  before: 200 +FORWARD -s 0.0.0.0/32 -j DROP
  now:    400 bad_path
  reason: a rule for every packet is too easy to make; that of 0.2.2 matched none
PUT /drop/input/any/11.22.33.44/?expire=600
  before: 200 +INPUT -s 11.22.33.44/32 -j DROP
  now:    200 inserted +INPUT -s 11.22.33.44/32 -j DROP
PUT /drop/input/any/7.7.7.77/24
  before: 200 +INPUT -s 7.7.7.0/24 -j DROP
  now:    200 inserted +INPUT -s 7.7.7.0/24 -j DROP
PUT /drop/input/any/7.7.7.0/24
  before: 200 +INPUT -s 7.7.7.0/24 -j DROP
  now:    200 exists
  reason: host bits are cleared, so it is the rule that exists; 0.2.2 doubled it
PUT /accept/input/any/1.2.3.5
  before: 200 +INPUT -s 1.2.3.5/32 -j ACCEPT
  now:    200 inserted +INPUT -s 1.2.3.5/32 -j ACCEPT
PUT /drop/input/any/1.2.3.5
  before: 200
  now:    200 inserted +INPUT -s 1.2.3.5/32 -j DROP
  reason: the newer rule comes first; 0.2.2 left the ACCEPT in front and answered 200
GET /
  before: 200
  now:    200
GET /list
  before: 200 0 rules
  now:    200 11 rules
  reason: 0.2.2 finds no rule in what iptables 1.8.9 lists
GET /list/input
  before: 200 0 rules
  now:    200 6 rules
  reason: 0.2.2 finds no rule in what iptables 1.8.9 lists
GET /list/nat
  before: 400
  now:    404 not_found
  reason: 404 for what does not exist
GET /list/input/1
  before: 400
  now:    404 not_found
  reason: 404 for what does not exist
GET /metrics
  before: 400
  now:    200
  reason: new
GET /drop/input/any/1.2.3.6?modify=insert
  before: 200 +INPUT -s 1.2.3.6/32 -j DROP
  now:    200 inserted +INPUT -s 1.2.3.6/32 -j DROP
GET /drop/input/any/1.2.3.6?modify=DELETE
  before: 200 -INPUT -s 1.2.3.6/32 -j DROP
  now:    400 bad_query
  reason: values are exact; 0.2.2 lower-cased them
GET /drop/input/any/1.2.3.6
  before: 400
  now:    400 bad_query
GET /drop/input/any/1.2.3.6?modify=change
  before: 400
  now:    400 bad_query
PUT /drop/input/any/1.2.3.6?modify=delete
  before: 200 +INPUT -s 1.2.3.6/32 -j DROP
  now:    400 bad_query
  reason: it contradicts itself; 0.2.2 inserted the rule
PUT /
  before: 400
  now:    405 method_not_allowed
  reason: 405 for a known path, with Allow
PUT /list
  before: 400
  now:    405 method_not_allowed
  reason: 405 for a known path, with Allow
POST /drop/input/any/1.2.3.6
  before: 501
  now:    405 method_not_allowed
  reason: 405 for a known path, with Allow
PUT /drop/input/any/1.2.3.7?expire=10m
  before: 200 +INPUT -s 1.2.3.7/32 -j DROP
  now:    200 inserted +INPUT -s 1.2.3.7/32 -j DROP
PUT /drop/input/any/1.2.3.8?expire=10x
  before: 400
  now:    400 bad_expire
PUT /drop/input/any/1.2.3.8?expire=1234567890
  before: 400
  now:    400 bad_expire
PUT /drop/input/any/1.2.3.8?expire=
  before: 200 +INPUT -s 1.2.3.8/32 -j DROP
  now:    400 bad_expire
  reason: 0.2.2 made it a rule with the default expiry
PUT /drop/input/any/1.2.3.8?expire=1h&expire=2h
  before: 200
  now:    400 bad_query
  reason: only one expiry can be meant; 0.2.2 took the last
DELETE /drop/input/any/1.2.3.8?expire=1h
  before: 200 -INPUT -s 1.2.3.8/32 -j DROP
  now:    400 bad_query
  reason: only a PUT has an expiry; 0.2.2 deleted the rule at once
PUT /drop/input/any/1.2.3.9?wait=true
  before: 200 +INPUT -s 1.2.3.9/32 -j DROP
  now:    200 inserted +INPUT -s 1.2.3.9/32 -j DROP
PUT /drop/input/any/1.2.3.9?wait=no
  before: 400
  now:    400 bad_query
PUT /drop/input/any/1.2.3.10?colour=red
  before: 200 +INPUT -s 1.2.3.10/32 -j DROP
  now:    400 bad_query
  reason: an unknown parameter is an error, most likely a misspelt one
PUT /drop/input/any/192.0.2.1
  before: 400
  now:    409 whitelisted
  reason: 409 for a conflict with the whitelist
PUT /drop/input/any/10.5.1.0/24
  before: 400
  now:    409 whitelisted
  reason: 409 for a conflict with the whitelist
PUT /drop/input/any/10.0.0.0/9
  before: 400
  now:    409 whitelisted
  reason: 409 for a conflict with the whitelist
PUT /drop/forward/any/8.8.8.8/any/192.0.2.1
  before: 400
  now:    409 whitelisted
  reason: 409 for a conflict with the whitelist
PUT /drop/input/any/127.0.0.1
  before: 200 +INPUT -s 127.0.0.1/32 -j DROP
  now:    409 whitelisted
  reason: loopback is always whitelisted; 0.2.2 locked out its own clients
PUT /drop/input/any/0.0.0.0
  before: 200 +INPUT -s 0.0.0.0/32 -j DROP
  now:    400 bad_address
  reason: it names no host; the rule of 0.2.2 matched no packet
PUT /drop/input/any/1.2.3.4/8
  before: 400
  now:    400 bad_mask
PUT /drop/input/any/1.2.3.4/33
  before: 400
  now:    400 bad_mask
PUT /drop/input/any/1.2.3.256
  before: 400
  now:    400 bad_address
PUT /drop/input/any/01.2.3.11
  before: 200 +INPUT -s 1.2.3.11/32 -j DROP
  now:    400 bad_address
  reason: a leading zero is octal for some programs
PUT /drop/input/any/1%2e2.3.12
  before: 400
  now:    200 inserted +INPUT -s 1.2.3.12/32 -j DROP
  reason: percent-escapes are decoded, as RFC 3986 has it
PUT /drop/input/any/2001:db8::1
  before: 400
  now:    200 inserted +INPUT -s 2001:db8::1/128 -j DROP
  reason: IPv6 is new
PUT /drop/input/any/::ffff:1.2.3.13
  before: 400
  now:    200 inserted +INPUT -s 1.2.3.13/32 -j DROP
  reason: it is the IPv4 address
PUT /drop/input/any
  before: 400
  now:    400 empty_list
PUT /drop/prerouting/any/1.2.3.4
  before: 400
  now:    404 not_found
  reason: 404 for what does not exist
PUT /log/input/any/1.2.3.4
  before: 400
  now:    404 not_found
  reason: 404 for what does not exist
PUT /drop/input/e;0/1.2.3.14
  before: 200 +INPUT -s 1.2.3.14/32 -j DROP
  now:    400 bad_interface
  reason: not a valid interface; 0.2.2 never passed it to iptables
PUT /drop/input/any/1.2.3.4/24/eth1
  before: 400
  now:    400 bad_path
";

/// The rows of REQUESTS: the request, before, now, the reason ("" without a difference).
fn rows() -> Vec<[&'static str; 4]> {
    let names = ["", "  before: ", "  now:    ", "  reason: "];
    let lines: Vec<&str> = REQUESTS.lines().collect();
    let row = |row: &[&'static str]| {
        assert!([3, 4].contains(&row.len()), "{row:?}");
        let text =
            |n| row.get(n).map_or("", |line: &&str| line.strip_prefix(names[n]).expect(line));
        std::array::from_fn(text)
    };
    lines.chunk_by(|_, next| next.starts_with(' ')).map(row).collect()
}

#[test]
fn every_difference_from_0_2_2_has_a_reason() {
    for [request, before, now, reason] in rows() {
        // 0.2.2 had no word for the result.
        let words = now.split(' ').enumerate().filter(|(number, _)| *number != 1 || !has_word(now));
        let now: Vec<&str> = words.map(|(_, word)| word).collect();
        assert_eq!(before == now.join(" "), reason.is_empty(), "{request}");
    }
}

#[test]
fn requests_of_a_0_2_2_client() {
    both(|lab| {
        lab.write("white.list", "192.0.2.1\n10.5.0.0/16\n");
        let _rfw = lab.start("local.server\nnon.restful");
        let rows: Vec<_> = rows().into_iter().map(|[request, _, now, _]| (request, now)).collect();
        table(&rows, |request| {
            let before = count(lab);
            let answer = ask(request);
            let mut got = answer.brief();
            if request.starts_with("GET /list") && answer.status == 200 {
                got += &format!(" {} rules", answer.body.matches("\"chain\"").count());
            }
            let after = count(lab);
            let more = |a: &BTreeMap<String, usize>, b: &BTreeMap<String, usize>, sign| {
                let is_more = |(rule, n): &(&String, &usize)| b.get(*rule).unwrap_or(&0) < *n;
                a.iter()
                    .filter(is_more)
                    .map(|(rule, _)| format!(" {sign}{rule}"))
                    .collect::<String>()
            };
            got += &(more(&after, &before, '+') + &more(&before, &after, '-'));
            if answer.body.contains("\"note\"") {
                got += " note";
            }
            got
        });
    });
}

/// Whether a result or an error code follows the status.
fn has_word(answer: &str) -> bool {
    answer.get(4..5).is_some_and(|first| first.starts_with(char::is_lowercase))
}

/// How often each of rfw's rules occurs in the kernel.
fn count(lab: &Lab) -> BTreeMap<String, usize> {
    let mut rules = BTreeMap::new();
    for rule in lab.rules() {
        let rule = rule.split(" [").next().unwrap();
        *rules.entry(rule.to_string()).or_insert(0) += 1;
    }
    rules
}
