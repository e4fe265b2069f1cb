//! The real program, real iptables in both variants, real curl, real packets: end to end.
//!
//! Every test runs in a network namespace of its own (see `lab`), never in the host's. Reading
//! order: the harness, the program as a command, its log and its processes, its API, what it does
//! to the kernel, lists, sets, tags, users, the state file and a start before the network (`boot`), then
//! HTTP, TLS, clients that delay others (`server`), the client, packets, kill -9, and the defects that
//! must not return: of rfw 0.2.2 (`regressions`), and of 0.3 (`repair`, `commits`).

#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

mod lab;

mod api;
mod boot;
mod client;
mod commits;
mod crash;
mod docs;
mod faults;
mod http;
mod kernel;
mod lists;
mod log;
mod old_rfw;
mod packets;
mod process;
mod program;
mod readme;
mod regressions;
mod repair;
mod server;
mod sets;
mod start;
mod state;
mod tags;
mod tls;
mod users;
