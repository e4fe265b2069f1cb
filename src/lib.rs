//! rfw: a REST server that blocks and allows IP addresses in iptables.
//!
//! In the order in which a request travels:
//!
//! 1. [`server`]: the listeners, how many connections at a time, and the whole life of a request;
//! 2. [`http`]: bytes to requests, requests to who is asking, responses to bytes;
//! 3. [`api`]: a request to a command;
//! 4. [`rule`]: what a rule is, and the whitelist that no change may touch;
//! 5. [`firewall`]: the command function, from a change to the kernel and back.
//!
//! Beside the way: [`state`] (the list on the disk), [`config`] (rfw.conf), [`file`] (who may own,
//! write and read it), [`nearest`] (did you mean ...?), [`host`] (its own addresses and
//! interfaces), [`log`], [`metrics`], [`clock`], [`mutex`] and [`notify`] (rfw is ready). The other
//! way round goes [`client`], the same program by the name of rfwc: from the command line to the
//! request, with what [`http`] has for it ([`http::answer`], [`http::tls`], [`http::deadline`]).

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod api;
pub mod client;
pub mod clock;
pub mod config;
pub mod file;
pub mod firewall;
pub mod host;
pub mod http;
pub mod log;
pub mod metrics;
pub mod mutex;
pub mod nearest;
pub mod notify;
pub mod rule;
pub mod server;
pub mod state;
