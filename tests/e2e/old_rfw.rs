//! Compatibility with clients of rfw 0.2.2: the same requests to both versions, and the reason for
//! every difference.

use crate::lab::*;
use std::collections::BTreeMap;

/// The request; the response of rfw 0.2.2, with Python 2.7.18 and iptables-nft 1.8.9, and the rules
/// that appeared (`+`) or disappeared (`-`); the same for this rfw; why they differ. The requests
/// are sent in this order, to an empty kernel, with `non.restful`, and 192.0.2.1 and 10.5.0.0/16 in
/// white.list. The rule for 127.0.0.1 was removed by hand, because 0.2.2 no longer responded.
const REQUESTS: [(&str, &str, &str, &str); 59] = [
    (
        "PUT /drop/input/eth0/1.2.3.4",
        "200 +INPUT -s 1.2.3.4/32 -j DROP",
        "200 inserted +INPUT -s 1.2.3.4/32 -i eth0 -j DROP note",
        "0.2.2 never passed the interface to iptables; this host has no eth0, which the note says",
    ),
    (
        "PUT /drop/input/eth0/1.2.3.4",
        "200",
        "200 exists note",
        "this host has no eth0, which the note says",
    ),
    (
        "DELETE /drop/input/eth0/1.2.3.4",
        "200 -INPUT -s 1.2.3.4/32 -j DROP",
        "200 deleted -INPUT -s 1.2.3.4/32 -i eth0 -j DROP note",
        "it is the rule for eth0",
    ),
    (
        "DELETE /drop/input/eth0/1.2.3.4",
        "200",
        "200 absent note",
        "this host has no eth0, which the note says",
    ),
    (
        "PUT /drop/input/any/1.2.3.4",
        "200 +INPUT -s 1.2.3.4/32 -j DROP",
        "200 inserted +INPUT -s 1.2.3.4/32 -j DROP",
        "",
    ),
    (
        "PUT /DROP/Input/ANY/1.2.3.5",
        "200 +INPUT -s 1.2.3.5/32 -j DROP",
        "400 bad_interface",
        "the names of interfaces keep their case, and 'ANY' is not 'any'",
    ),
    (
        "PUT /drop/input/lo/1.2.3.4",
        "200 +INPUT -s 1.2.3.4/32 -j DROP",
        "200 inserted +INPUT -s 1.2.3.4/32 -i lo+ -j DROP",
        "0.2.2 added the same rule again, for it never passed the interface to iptables",
    ),
    (
        "PUT /reject/output/any/9.9.9.9",
        "200 +OUTPUT -d 9.9.9.9/32 -j REJECT",
        "200 inserted +OUTPUT -d 9.9.9.9/32 -j REJECT",
        "",
    ),
    (
        "PUT /accept/output/any/192.168.0.0/24",
        "200 +OUTPUT -d 192.168.0.0/24 -j ACCEPT",
        "200 inserted +OUTPUT -d 192.168.0.0/24 -j ACCEPT",
        "",
    ),
    (
        "PUT /accept/forward/ppp/1.2.3.0/24/eth0/5.5.5.5",
        "200 +FORWARD -s 1.2.3.0/24 -d 5.5.5.5/32 -j ACCEPT",
        "200 inserted +FORWARD -s 1.2.3.0/24 -d 5.5.5.5/32 -i ppp+ -o eth0 -j ACCEPT note",
        "0.2.2 never passed the interfaces to iptables; this host has no such interfaces: a note",
    ),
    (
        "PUT /drop/forward/any/1.2.3.4",
        "200 +FORWARD -s 1.2.3.4/32 -j DROP",
        "200 inserted +FORWARD -s 1.2.3.4/32 -j DROP",
        "",
    ),
    (
        "PUT /drop/forward/any/0.0.0.0/any/1.2.3.4",
        "200 +FORWARD -s 0.0.0.0/32 -d 1.2.3.4/32 -j DROP",
        "200 inserted +FORWARD -d 1.2.3.4/32 -j DROP",
        "0.0.0.0 is any address in FORWARD; the rule of 0.2.2 matched no packet",
    ),
    (
        "PUT /drop/forward/any/0.0.0.0",
        "200 +FORWARD -s 0.0.0.0/32 -j DROP",
        "400 bad_path",
        "a rule for every packet is too easy to make; that of 0.2.2 matched none",
    ),
    (
        "PUT /drop/input/any/11.22.33.44/?expire=600",
        "200 +INPUT -s 11.22.33.44/32 -j DROP",
        "200 inserted +INPUT -s 11.22.33.44/32 -j DROP",
        "",
    ),
    (
        "PUT /drop/input/any/7.7.7.77/24",
        "200 +INPUT -s 7.7.7.0/24 -j DROP",
        "200 inserted +INPUT -s 7.7.7.0/24 -j DROP",
        "",
    ),
    (
        "PUT /drop/input/any/7.7.7.0/24",
        "200 +INPUT -s 7.7.7.0/24 -j DROP",
        "200 exists",
        "host bits are cleared, so it is the rule that exists; 0.2.2 doubled it",
    ),
    (
        "PUT /accept/input/any/1.2.3.5",
        "200 +INPUT -s 1.2.3.5/32 -j ACCEPT",
        "200 inserted +INPUT -s 1.2.3.5/32 -j ACCEPT",
        "",
    ),
    (
        "PUT /drop/input/any/1.2.3.5",
        "200",
        "200 inserted +INPUT -s 1.2.3.5/32 -j DROP",
        "the newer rule comes first; 0.2.2 left the ACCEPT in front and answered 200",
    ),
    ("GET /", "200", "200", ""),
    (
        "GET /list",
        "200 0 rules",
        "200 11 rules",
        "0.2.2 finds no rule in what iptables 1.8.9 lists",
    ),
    (
        "GET /list/input",
        "200 0 rules",
        "200 6 rules",
        "0.2.2 finds no rule in what iptables 1.8.9 lists",
    ),
    ("GET /list/nat", "400", "404 not_found", "404 for what does not exist"),
    ("GET /list/input/1", "400", "404 not_found", "404 for what does not exist"),
    ("GET /metrics", "400", "200", "new"),
    (
        "GET /drop/input/any/1.2.3.6?modify=insert",
        "200 +INPUT -s 1.2.3.6/32 -j DROP",
        "200 inserted +INPUT -s 1.2.3.6/32 -j DROP",
        "",
    ),
    (
        "GET /drop/input/any/1.2.3.6?modify=DELETE",
        "200 -INPUT -s 1.2.3.6/32 -j DROP",
        "400 bad_query",
        "values are exact; 0.2.2 lower-cased them",
    ),
    ("GET /drop/input/any/1.2.3.6", "400", "400 bad_query", ""),
    ("GET /drop/input/any/1.2.3.6?modify=change", "400", "400 bad_query", ""),
    (
        "PUT /drop/input/any/1.2.3.6?modify=delete",
        "200 +INPUT -s 1.2.3.6/32 -j DROP",
        "400 bad_query",
        "it contradicts itself; 0.2.2 inserted the rule",
    ),
    ("PUT /", "400", "405 method_not_allowed", "405 for a known path, with Allow"),
    ("PUT /list", "400", "405 method_not_allowed", "405 for a known path, with Allow"),
    (
        "POST /drop/input/any/1.2.3.6",
        "501",
        "405 method_not_allowed",
        "405 for a known path, with Allow",
    ),
    (
        "PUT /drop/input/any/1.2.3.7?expire=10m",
        "200 +INPUT -s 1.2.3.7/32 -j DROP",
        "200 inserted +INPUT -s 1.2.3.7/32 -j DROP",
        "",
    ),
    ("PUT /drop/input/any/1.2.3.8?expire=10x", "400", "400 bad_expire", ""),
    ("PUT /drop/input/any/1.2.3.8?expire=1234567890", "400", "400 bad_expire", ""),
    (
        "PUT /drop/input/any/1.2.3.8?expire=",
        "200 +INPUT -s 1.2.3.8/32 -j DROP",
        "400 bad_expire",
        "0.2.2 made it a rule with the default expiry",
    ),
    (
        "PUT /drop/input/any/1.2.3.8?expire=1h&expire=2h",
        "200",
        "400 bad_query",
        "only one expiry can be meant; 0.2.2 took the last",
    ),
    (
        "DELETE /drop/input/any/1.2.3.8?expire=1h",
        "200 -INPUT -s 1.2.3.8/32 -j DROP",
        "400 bad_query",
        "only a PUT has an expiry; 0.2.2 deleted the rule at once",
    ),
    (
        "PUT /drop/input/any/1.2.3.9?wait=true",
        "200 +INPUT -s 1.2.3.9/32 -j DROP",
        "200 inserted +INPUT -s 1.2.3.9/32 -j DROP",
        "",
    ),
    ("PUT /drop/input/any/1.2.3.9?wait=no", "400", "400 bad_query", ""),
    (
        "PUT /drop/input/any/1.2.3.10?colour=red",
        "200 +INPUT -s 1.2.3.10/32 -j DROP",
        "400 bad_query",
        "an unknown parameter is an error, most likely a misspelt one",
    ),
    (
        "PUT /drop/input/any/192.0.2.1",
        "400",
        "409 whitelisted",
        "409 for a conflict with the whitelist",
    ),
    (
        "PUT /drop/input/any/10.5.1.0/24",
        "400",
        "409 whitelisted",
        "409 for a conflict with the whitelist",
    ),
    (
        "PUT /drop/input/any/10.0.0.0/9",
        "400",
        "409 whitelisted",
        "409 for a conflict with the whitelist",
    ),
    (
        "PUT /drop/forward/any/8.8.8.8/any/192.0.2.1",
        "400",
        "409 whitelisted",
        "409 for a conflict with the whitelist",
    ),
    (
        "PUT /drop/input/any/127.0.0.1",
        "200 +INPUT -s 127.0.0.1/32 -j DROP",
        "409 whitelisted",
        "loopback is always whitelisted; 0.2.2 locked out its own clients",
    ),
    (
        "PUT /drop/input/any/0.0.0.0",
        "200 +INPUT -s 0.0.0.0/32 -j DROP",
        "400 bad_address",
        "it names no host; the rule of 0.2.2 matched no packet",
    ),
    ("PUT /drop/input/any/1.2.3.4/8", "400", "400 bad_mask", ""),
    ("PUT /drop/input/any/1.2.3.4/33", "400", "400 bad_mask", ""),
    ("PUT /drop/input/any/1.2.3.256", "400", "400 bad_address", ""),
    (
        "PUT /drop/input/any/01.2.3.11",
        "200 +INPUT -s 1.2.3.11/32 -j DROP",
        "400 bad_address",
        "a leading zero is octal for some programs",
    ),
    (
        "PUT /drop/input/any/1%2e2.3.12",
        "400",
        "200 inserted +INPUT -s 1.2.3.12/32 -j DROP",
        "percent-escapes are decoded, as RFC 3986 has it",
    ),
    (
        "PUT /drop/input/any/2001:db8::1",
        "400",
        "200 inserted +INPUT -s 2001:db8::1/128 -j DROP",
        "IPv6 is new",
    ),
    (
        "PUT /drop/input/any/::ffff:1.2.3.13",
        "400",
        "200 inserted +INPUT -s 1.2.3.13/32 -j DROP",
        "it is the IPv4 address",
    ),
    ("PUT /drop/input/any", "400", "400 empty_list", ""),
    ("PUT /drop/prerouting/any/1.2.3.4", "400", "404 not_found", "404 for what does not exist"),
    ("PUT /log/input/any/1.2.3.4", "400", "404 not_found", "404 for what does not exist"),
    (
        "PUT /drop/input/e;0/1.2.3.14",
        "200 +INPUT -s 1.2.3.14/32 -j DROP",
        "400 bad_interface",
        "not a valid interface; 0.2.2 never passed it to iptables",
    ),
    ("PUT /drop/input/any/1.2.3.4/24/eth1", "400", "400 bad_path", ""),
];

#[test]
fn every_difference_from_0_2_2_has_a_reason() {
    for (request, before, now, reason) in REQUESTS {
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
        let mut wrong = String::new();
        for (request, _, expected, _) in REQUESTS {
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
            if got != expected {
                wrong += &format!("{request}\n    is     {got}\n    not    {expected}\n");
            }
        }
        assert!(wrong.is_empty(), "\n{wrong}");
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
