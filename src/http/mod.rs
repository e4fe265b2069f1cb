//! Bytes to requests and responses to bytes: as much of RFC 9110 and 9112 as
//! rfw needs.

pub mod api_error;
pub mod auth;
pub mod body;
pub mod certificate;
pub mod deadline;
pub mod json;
pub mod request;
pub mod response;
pub mod response_head;
pub mod stream;
pub mod tls;
