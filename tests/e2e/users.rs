//! Users and what each may do; the owner and mode of files that contain secrets.

use crate::lab::*;
use crate::tls;
use std::process::Command;

const CONF: &str = "local.server\nlocal.server.authentication\nauth.file = users";
const ADMIN: &str = "auth.username = admin\nauth.password = p0";
const USERS: &str = "# who sends us blocks
peer1:p1 tag=peer1
jails:p2 tag=sshd,nginx

guard:p3 read
boss:p:4# all
";

/// A request by curl; `user` is NAME:PASSWORD.
fn ask_as(user: &str, request: &str) -> Answer {
    send("http://127.0.0.1:7390", &format!("-u {user}"), request)
}

/// The same with a list.
fn list_as(lab: &Lab, user: &str, request: &str, lines: &str) -> Answer {
    lab.write("list", lines);
    send("http://127.0.0.1:7390", &format!("-u {user} --data-binary @/run/lab/list"), request)
}

fn send(server: &str, options: &str, request: &str) -> Answer {
    let said = curl(options, request, server);
    let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
    Answer { status: status.parse().expect(&said), head: String::new(), body: body.into() }
}

/// The comments of rfw's rules in INPUT, in kernel order.
fn comments(lab: &Lab) -> String {
    let listing = lab.iptables("-S INPUT");
    let comments =
        listing.lines().filter_map(|line| line.split_once("--comment ")?.1.split(' ').next());
    comments.map(|comment| comment.trim_matches('"')).collect::<Vec<_>>().join(" ")
}

#[test]
fn each_user_may_do_what_auth_file_says() {
    once(|lab| {
        lab.write("users", USERS);
        let _rfw = lab.start(&format!("{CONF}\n{ADMIN}"));
        // For the admin of rfw.conf, boss, guard, peer1 and jails.
        let users = ["admin:p0", "boss:p:4#", "guard:p3", "peer1:p1", "jails:p2"];
        let (yes, no) = ("200", "403 forbidden");
        let rows = [
            ("GET /", [yes; 5]),
            ("GET /metrics", [yes; 5]),
            ("GET /list", [yes; 5]),
            ("GET /list?tag=sshd", [yes; 5]),
            ("PUT /drop/input/any/1.1.1.1", [yes, yes, no, yes, yes]),
            ("PUT /drop/input/any/1.1.1.1?tag=peer1", [yes, yes, no, yes, no]),
            ("PUT /drop/input/any/1.1.1.1?tag=sshd", [yes, yes, no, no, yes]),
            ("PUT /drop/input/any/1.1.1.1?tag=nginx", [yes, yes, no, no, yes]),
            ("PUT /drop/input/any/1.1.1.1?tag=peer2", [yes, yes, no, no, no]),
            ("PUT /drop/input/any/1.1.1.1?tag=peer", [yes, yes, no, no, no]),
            ("DELETE /drop/input/any/1.1.1.1", [yes, yes, no, yes, yes]),
            ("DELETE /drop/input/any/1.1.1.1?tag=nginx", [yes, yes, no, no, yes]),
            ("DELETE /drop/input/any/1.1.1.1?tag=*", [yes, yes, no, no, no]),
            ("DELETE /list?tag=peer1", [yes, yes, no, yes, no]),
            ("DELETE /list/input?tag=nginx", [yes, yes, no, no, yes]),
            ("DELETE /list", ["400 bad_query"; 5]),
            ("PUT /nothing", ["404 not_found"; 5]),
        ];
        let mut wrong = String::new();
        for (request, expected) in rows {
            for (user, expected) in users.iter().zip(expected) {
                let got = ask_as(user, request).brief();
                if expected != if got.starts_with("200") { yes } else { &got } {
                    wrong += &format!("{user} {request}: {got}, not {expected}\n");
                }
            }
        }
        assert!(wrong.is_empty(), "\n{wrong}");
        let message =
            |user| ask_as(user, "PUT /drop/input/any/1.1.1.1?tag=x").field("message").to_string();
        assert_eq!(message("guard:p3"), "This user may send GET only.");
        let tags = "This user may send GET, and changes with tag=sshd or tag=nginx.";
        assert_eq!(message("jails:p2"), tags);
        let rows = ["", "peer1:p2", "peer1:", ":p1", "boss:p", "boss:p:4", "admin:p1", "Boss:p:4#"];
        for user in rows {
            let options = if user.is_empty() { String::new() } else { format!("-u {user}") };
            let got = send("http://127.0.0.1:7390", &options, "GET /list").brief();
            assert_eq!(got, "401 unauthorized", "{user}");
        }
    });
}

#[test]
fn a_request_without_a_tag_gets_the_first_tag_of_its_user() {
    both(|lab| {
        lab.write("users", USERS);
        let _rfw = lab.start(&format!("{CONF}\n{ADMIN}"));
        let put = "PUT /drop/input/any/1.1.1.1";
        assert_eq!(ask_as("admin:p0", put).field("tag"), "null");
        let answer = ask_as("jails:p2", put);
        assert_eq!((answer.brief().as_str(), answer.field("tag")), ("200 inserted", "sshd"));
        ask_as("jails:p2", &format!("{put}?tag=nginx"));
        assert_eq!(comments(lab), "rfw@nginx rfw@sshd rfw");
        let delete = "DELETE /drop/input/any/1.1.1.1";
        assert_eq!(ask_as("jails:p2", delete).field("tag"), "sshd");
        assert_eq!(ask_as("jails:p2", delete).brief(), "200 absent");
        assert_eq!(comments(lab), "rfw@nginx rfw");
        // Lists, too; `replace` requires a tag, which this user has.
        let list = |user, request, lines| list_as(lab, user, request, lines).sums();
        assert_eq!(list("peer1:p1", "PUT /drop/input/any", "2.2.2.2\n3.3.3.3\n"), "inserted 2");
        let replace = "PUT /drop/input/any?replace=true";
        assert_eq!(list("peer1:p1", replace, "3.3.3.3\n"), "exists 1 deleted 1");
        assert_eq!(list("admin:p0", replace, "3.3.3.3\n"), "400 bad_query");
        assert_eq!(comments(lab), "rfw@peer1 rfw@nginx rfw");
        assert_eq!(
            list("peer1:p1", "DELETE /drop/input/any", "1.1.1.1\n3.3.3.3\n"),
            "deleted 1 absent 1"
        );
        assert_eq!(comments(lab), "rfw@nginx rfw");
    });
}

/// Not one by one, not by a list, and not all at once.
#[test]
fn a_peer_withdraws_its_own_rules_and_no_others() {
    once(|lab| {
        lab.write("users", "peer1:p1 tag=peer1\npeer2:p2 tag=peer2\n");
        modes(lab, "local.server.authentication\nauth.file = users", |_, _| {
            let (one, two) = ("peer1:p1", "peer2:p2");
            let put = "PUT /drop/input/any/1.1.1.1";
            assert_eq!(ask_as(one, put).brief(), "200 inserted");
            assert_eq!(ask_as(two, put).brief(), "200 inserted");
            let requests = [
                "DELETE /drop/input/any/1.1.1.1?tag=peer2",
                "DELETE /drop/input/any/1.1.1.1?tag=*",
                "DELETE /list?tag=peer2",
                "PUT /drop/input/any/1.1.1.1?tag=peer2&expire=1s",
            ];
            for request in requests {
                assert_eq!(ask_as(one, request).brief(), "403 forbidden", "{request}");
            }
            for query in ["?tag=peer2", "?tag=*", "?tag=peer2&replace=true"] {
                let method = if query.contains("replace") { "PUT" } else { "DELETE" };
                let request = format!("{method} /drop/input/any{query}");
                assert_eq!(list_as(lab, one, &request, "1.1.1.1\n").brief(), "403 forbidden");
            }
            assert_eq!(ask_as(one, "GET /list").body.matches("\"source\":").count(), 2);
            assert_eq!(ask_as(one, "DELETE /list?tag=peer1").sums(), "deleted 1");
            let left = ask_as(one, "GET /list");
            assert_eq!((left.field("source"), left.field("tag")), ("1.1.1.1", "peer2"));
        });
    });
}

#[test]
fn a_reader_cannot_change_rules_by_get() {
    once(|lab| {
        lab.write("users", USERS);
        let _rfw = lab.start(&format!("{CONF}\nnon.restful"));
        let get = "GET /drop/input/any/1.1.1.1?modify=";
        for (user, request, want) in [
            ("guard:p3", "insert", "403 forbidden"),
            ("peer1:p1", "insert", "200 inserted"),
            ("guard:p3", "delete", "403 forbidden"),
            ("peer1:p1", "delete&tag=*", "403 forbidden"),
            ("peer1:p1", "delete", "200 deleted"),
        ] {
            assert_eq!(ask_as(user, &format!("{get}{request}")).brief(), want, "{user} {request}");
        }
        assert_eq!(comments(lab), "");
    });
}

/// curl sends the body only after a 100.
#[test]
fn a_forbidden_list_is_refused_before_its_body() {
    once(|lab| {
        lab.write("users", USERS);
        let _rfw = lab.start(CONF);
        let fields =
            "Authorization: Basic Z3VhcmQ6cDM=\r\nExpect: 100-continue\r\nContent-Length: 9999\r\n";
        let answer = Conn::open().try_ask("PUT /drop/input/any", fields).unwrap();
        assert_eq!(answer.brief(), "403 forbidden");
        assert_eq!(answer.header("Connection"), Some("close"), "the body is not a request");
    });
}

#[test]
fn without_authentication_every_client_has_all_rights() {
    once(|lab| {
        lab.write("users", USERS);
        let _rfw = lab.start("local.server\nauth.file = users");
        let put = "PUT /drop/input/any/1.1.1.1";
        assert_eq!(ask(put).field("tag"), "null");
        assert_eq!(ask_as("guard:p3", &format!("{put}?tag=peer1")).brief(), "200 inserted");
        assert_eq!(ask("DELETE /drop/input/any/1.1.1.1?tag=*").brief(), "200 deleted");
    });
}

/// `auth.file` instead of `auth.username`.
#[test]
fn users_of_the_outward_server() {
    once(|lab| {
        tls::keys(lab);
        lab.write("users", USERS);
        let conf = tls::CONF.split("auth.username").next().unwrap();
        let _rfw = lab.start(&format!("{conf}auth.file = users"));
        let put = "PUT /drop/input/any/1.1.1.1";
        for (user, want) in [
            ("peer1:p1", "200 inserted"),
            ("guard:p3", "403 forbidden"),
            ("mu:s3cret:pass", "401 unauthorized"),
        ] {
            let options = format!("--cacert /run/lab/keys/client/ca.crt -u {user}");
            assert_eq!(send("https://127.0.0.1:7393", &options, put).brief(), want, "{user}");
        }
        assert!(comments(lab).ends_with("rfw@peer1"));
    });
}

/// Correct credentials of another user must wait, too.
#[test]
fn guesses_are_counted_per_address_whatever_the_user() {
    once(|lab| {
        lab.write("users", USERS);
        let _rfw = lab.start(CONF);
        let guesses = ["peer1:x", "guard:x", "nobody:x"];
        let statuses = guesses.iter().cycle().take(11).map(|user| ask_as(user, "GET /list").status);
        assert_eq!(statuses.collect::<Vec<_>>(), [401; 11]);
        assert_eq!(ask_as("boss:p:4#", "GET /list").status, 429);
        let other = "-u boss:p:4# --interface 127.0.0.2";
        assert_eq!(send("http://127.0.0.1:7390", other, "GET /list").status, 200);
    });
}

#[test]
fn the_log_names_the_user_and_the_tag() {
    once(|lab| {
        lab.write("users", USERS);
        let _rfw = lab.start(CONF);
        ask_as("boss:p:4#", "PUT /drop/input/any/1.1.1.1");
        ask_as("jails:p2", "PUT /drop/input/any/1.1.1.1");
        ask_as("jails:p2", "DELETE /list?tag=nginx");
        list_as(lab, "peer1:p1", "PUT /drop/input/any", "1.1.1.1\n");
        ask_as("guard:p3", "PUT /drop/input/any/1.1.1.1");
        ask_as("guard:p4", "GET /list");
        for line in [
            " INFO 127.0.0.1 boss \"PUT /drop/input/any/1.1.1.1\" inserted ",
            " INFO 127.0.0.1 jails @sshd \"PUT /drop/input/any/1.1.1.1\" inserted ",
            " INFO 127.0.0.1 jails @nginx \"DELETE /list?tag=nginx\" applied: 0 deleted ",
            " INFO 127.0.0.1 peer1 @peer1 \"PUT /drop/input/any\" applied: 1 inserted, ",
            " INFO 127.0.0.1 guard \"PUT /drop/input/any/1.1.1.1\" 403 forbidden ",
            " INFO 127.0.0.1 - \"GET /list\" 401 unauthorized ",
        ] {
            await_true(line, SLACK, || lab.read("rfw.log").contains(line));
        }
        assert!(!lab.read("rfw.log").contains("p:4"));
    });
}

#[test]
fn rfw_does_not_start_with_an_invalid_auth_file() {
    once(|lab| {
        lab.configure(&format!("{CONF}\n{ADMIN}"));
        let rows = [
            ("", "users: the file names no user"),
            ("# none\n", "users: the file names no user"),
            ("a:secret all\nb:secret\n", "users:2: write NAME:PASSWORD RIGHTS"),
            ("a:secret all\n\nb: all\n", "users:3: write NAME:PASSWORD;"),
            (
                "a:secret tag=A\n",
                "users:1: the rights are not valid; write all, read or tag=NAME[,NAME...], in lower case",
            ),
            ("a:secret all\na:secret2 read\n", "users:2: user 'a' exists already"),
            ("admin:secret all\n", "users:1: user 'admin' exists already"),
        ];
        for (users, words) in rows {
            lab.write("users", users);
            for options in ["-t -f rfw.conf", "-f rfw.conf --logfile -"] {
                let (status, said) = lab.rfw(options);
                assert!(status == 1 && said.contains(words), "{users}: {status} {said}");
                assert!(!said.contains("secret"), "a password: {said}");
            }
        }
        sh("rm lab/users");
        let (status, said) = lab.rfw("-t -f rfw.conf");
        assert!(status == 1 && said.contains("rfw.conf:6: ") && said.contains("users"), "{said}");
        lab.write("users", USERS);
        assert_eq!(lab.rfw("-t -f rfw.conf").0, 0);
    });
}

/// Others must not be able to read or write a file with secrets. The fix in the message works.
#[test]
fn secrets_that_others_can_read_are_refused() {
    once(|lab| {
        tls::keys(lab);
        lab.write("users", USERS);
        lab.configure(&format!("{}\nauth.file = users", tls::CONF));
        let check = || lab.rfw("-t -f rfw.conf");
        assert_eq!(check().0, 0);
        let has_groups = Command::new("chgrp").args(["4321", "/run/lab/users"]).status().unwrap();
        for file in ["rfw.conf", "users", "keys/server_127.0.0.1/server.key"] {
            for mode in ["604", "640", "644"] {
                if mode == "640" && !has_groups.success() {
                    continue;
                }
                sh(&format!("cd lab; chgrp 4321 {file} || true; chmod {mode} {file}"));
                let (status, said) = check();
                assert_eq!(status, 1, "{mode} {file}: {said}");
                assert!(said.contains(&format!("{file}: ")), "{said}");
                let (_, advice) = said.rsplit_once("; run ").expect(&said);
                assert_eq!(advice, format!("chmod 600 {file}\n"), "{said}");
                sh(&format!("cd lab; {advice}"));
                assert_eq!(check().0, 0);
            }
            // Only systemd's credentials may be readable by group root.
            sh(&format!("cd lab; chgrp 0 {file}; chmod 440 {file}"));
            assert_eq!(check().0, 1, "{file}");
            sh("mkdir -p credentials/rfw.service; cp -pr lab/. credentials/rfw.service");
            let (status, said) = lab.rfw("-t -f /run/credentials/rfw.service/rfw.conf");
            assert_eq!(status, 0, "{file}: {said}");
            sh(&format!("cd lab; chmod 600 {file}"));
        }
        // Files without secrets may be readable by all.
        sh("cd lab; chmod 644 white.list keys/server_127.0.0.1/server.crt");
        assert_eq!(check().0, 0);
        lab.configure("local.server");
        sh("chmod 644 lab/rfw.conf");
        assert_eq!(check().0, 0, "it holds no password");
    });
}

#[test]
fn files_of_other_users_are_refused() {
    once(|lab| {
        lab.write("users", USERS);
        lab.write("state", "rfw state 2\n");
        lab.configure(&format!("{CONF}\nstate.file = state"));
        if Command::new("chown").args(["4321", "/run/lab/users"]).status().unwrap().success() {
            sh("chown 0 lab/users");
            for file in ["rfw.conf", "users", "white.list", "state"] {
                sh(&format!("chown 4321 lab/{file}; chmod 644 lab/{file}"));
                let (status, said) = lab.rfw("-t -f rfw.conf");
                assert!(status == 1 && said.contains(&format!("{file}: user 4321")), "{said}");
                let (_, advice) = said.rsplit_once("; run ").expect(&said);
                assert!(
                    ["root", "65534"]
                        .map(|own| format!("chown {own} {file}\n"))
                        .contains(&advice.into()),
                    "{said}"
                );
                sh(&format!("cd lab; chmod 600 {file}; {advice}"));
                let (status, said) = lab.rfw("-t -f rfw.conf");
                assert_eq!(status, 0, "{said}");
            }
        }
        assert_eq!(lab.rfw("-t -f rfw.conf").0, 0);
    });
}

/// A copy by root of the state file of the unit, which cannot open it: `rfw -t`, as root, accepted it.
#[test]
fn a_state_file_of_root_in_the_directory_of_the_unit() {
    if !has_users("users::a_state_file_of_root_in_the_directory_of_the_unit") {
        return;
    }
    once(|lab| {
        lab.configure("local.server\nstate.file = /var/lib/rfw/state");
        // As systemd makes them.
        sh("mount -t tmpfs lab /var/lib; cd /var/lib; mkdir -m 700 private
            install -d -m 700 -o 4321 private/rfw; ln -s private/rfw rfw
            echo rfw state 2 > rfw/state; chown root /run/lab/*");
        let check = concat!("cd lab; ", env!("CARGO_BIN_EXE_rfw"), " -t -f rfw.conf 2>&1 || true");
        let said = sh(check);
        let (_, advice) = said.rsplit_once(" unit does not own it; run ").expect(&said);
        sh(advice);
        assert!(sh(check).starts_with("rfw.conf: OK\n"), "{}", sh(check));
    });
}
