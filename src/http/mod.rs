//! Bytes to requests and responses to bytes: RFC 9110 and 9112, no more of
//! them than rfw needs.

pub mod answer;
pub mod api_error;
pub mod auth;
pub mod body;
pub mod certificate;
pub mod deadline;
pub mod json;
pub mod request;
pub mod response;
pub mod stream;
pub mod tls;
