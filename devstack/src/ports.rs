//! Ports on 127.0.0.1: chosen once per stack among the free ones, then kept; or reserved by a process for its own servers.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::net::TcpSocket;

use crate::failure::{Exit, Failure};

/// How many ports are tried from the preferred one upwards.
const ATTEMPTS: u16 = 500;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ports {
    pub postgres: u16,
    pub kafka: u16,
    pub kafka_controller: u16,
    /// Of Kafka Connect's REST interface.
    #[serde(default)]
    pub debezium: u16,
    pub logistics: u16,
    pub commerce: u16,
}

/// Preferred ports; below the range from which the kernel takes ports for outgoing connections.
const PREFERRED: Ports = Ports {
    postgres: 15432,
    kafka: 19092,
    kafka_controller: 19592,
    debezium: 18083,
    logistics: 8080,
    commerce: 8081,
};

/// Ports that a person asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct WantedPorts {
    pub postgres: Option<u16>,
    pub kafka: Option<u16>,
    pub logistics: Option<u16>,
    pub commerce: Option<u16>,
}

impl Ports {
    /// The wanted port, else the one of the last run while it is free, else the next free one from the preferred one
    /// upwards that is not in `reserved` (other stacks, running or not).
    ///
    /// Errors when a wanted port is in use.
    pub fn choose(wanted: WantedPorts, last: Option<Self>, reserved: &[Self]) -> Result<Self, Failure> {
        Self::choose_among(is_free, wanted, last, reserved)
    }

    fn choose_among(
        is_free: impl Fn(u16) -> bool,
        wanted: WantedPorts,
        last: Option<Self>,
        reserved: &[Self],
    ) -> Result<Self, Failure> {
        // The ports that a person asked for, and those that the parts of this stack had: nobody else's search may end there.
        let asked = [wanted.postgres, wanted.kafka, wanted.logistics, wanted.commerce];
        let kept: Vec<u16> = asked
            .into_iter()
            .flatten()
            .chain(last.iter().flat_map(Self::all))
            .collect();
        let mut taken: Vec<u16> = reserved.iter().flat_map(Self::all).collect();
        let mut choose = |name: &str, wanted: Option<u16>, last: Option<u16>, preferred: u16| {
            let port = match (wanted, last) {
                (Some(port), _) if is_free(port) && !taken.contains(&port) => port,
                (Some(port), _) => {
                    return Err(Failure::new(
                        Exit::Usage,
                        format!("port {port} is in use, or belongs to another part or stack"),
                        format!("give another one with --{name}-port, or none to have a free one chosen"),
                    ));
                }
                (None, Some(port)) if is_free(port) && !taken.contains(&port) => port,
                (None, _) => (preferred..preferred + ATTEMPTS)
                    .find(|port| !taken.contains(port) && !kept.contains(port) && is_free(*port))
                    .ok_or_else(|| {
                        Failure::new(
                            Exit::Failed,
                            format!("no port from {preferred} to {} is free", preferred + ATTEMPTS),
                            format!("give one with --{name}-port"),
                        )
                    })?,
            };
            taken.push(port);
            Ok(port)
        };
        Ok(Self {
            postgres: choose(
                "postgres",
                wanted.postgres,
                last.map(|p| p.postgres),
                PREFERRED.postgres,
            )?,
            kafka: choose("kafka", wanted.kafka, last.map(|p| p.kafka), PREFERRED.kafka)?,
            kafka_controller: choose(
                "kafka",
                None,
                last.map(|p| p.kafka_controller),
                PREFERRED.kafka_controller,
            )?,
            debezium: choose(
                "debezium",
                None,
                // A state from before there was one says 0.
                last.map(|p| p.debezium).filter(|port| *port != 0),
                PREFERRED.debezium,
            )?,
            logistics: choose(
                "logistics",
                wanted.logistics,
                last.map(|p| p.logistics),
                PREFERRED.logistics,
            )?,
            commerce: choose(
                "commerce",
                wanted.commerce,
                last.map(|p| p.commerce),
                PREFERRED.commerce,
            )?,
        })
    }

    fn all(&self) -> [u16; 6] {
        [
            self.postgres,
            self.kafka,
            self.kafka_controller,
            self.debezium,
            self.logistics,
            self.commerce,
        ]
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// Reserves a port for a server that this process starts, until this process ends.
///
/// A port that was merely free a moment ago may be an outgoing connection's by the time the server binds it, or while
/// the server is down between a kill and its next start. This one stays bound to a socket that never listens: servers
/// that set `SO_REUSEADDR`, as they all do, bind it beside that socket as often as they like (socket(7)), and the kernel
/// gives it to nobody who asks for just any port. That is so on Linux; elsewhere the port is only free at this moment.
///
/// # Errors
/// If no port is free.
pub fn reserve() -> anyhow::Result<u16> {
    let socket = bind_without_listening().context("reserve a port")?;
    let port = socket
        .local_addr()
        .context("read the number of a reserved port")?
        .port();
    if cfg!(target_os = "linux") {
        // A few per process, for its whole life: the kernel closes them.
        std::mem::forget(socket);
    }
    Ok(port)
}

fn bind_without_listening() -> std::io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_or_reserved_by_another_stack_is_passed_over() {
        let in_use = |port| port != PREFERRED.logistics;
        let first = Ports::choose_among(in_use, WantedPorts::default(), None, &[]).unwrap();
        assert_eq!((first.logistics, first.commerce), (8081, 8082));
        let second = Ports::choose_among(in_use, WantedPorts::default(), None, &[first]).unwrap();
        assert!(first.all().iter().all(|port| !second.all().contains(port)));
    }

    #[test]
    fn the_ports_of_the_last_run_are_kept_while_free() {
        let last = Ports {
            logistics: 9000,
            ..PREFERRED
        };
        // Where nobody else was.
        let kept = Ports::choose_among(|_| true, WantedPorts::default(), Some(last), &[]).unwrap();
        assert_eq!(kept, last);
        let moved = Ports::choose_among(|port| port != 9000, WantedPorts::default(), Some(last), &[]).unwrap();
        assert_eq!(moved, PREFERRED);
    }

    /// Logistics must not move to where commerce was, or neither can ever start again.
    #[test]
    fn a_part_does_not_move_to_the_port_of_another() {
        let moved = Ports::choose_among(
            |port| port != PREFERRED.logistics,
            WantedPorts::default(),
            Some(PREFERRED),
            &[],
        )
        .unwrap();
        assert_eq!((moved.logistics, moved.commerce), (8082, 8081));
        let broken = Ports {
            logistics: 8081,
            ..PREFERRED
        };
        let repaired = Ports::choose_among(|_| true, WantedPorts::default(), Some(broken), &[]).unwrap();
        assert_ne!(repaired.logistics, repaired.commerce);
        let twice = WantedPorts {
            postgres: Some(15999),
            kafka: Some(15999),
            ..WantedPorts::default()
        };
        assert_eq!(
            Ports::choose_among(|_| true, twice, None, &[]).unwrap_err().exit,
            Exit::Usage
        );
    }

    #[test]
    fn a_wanted_port_in_use_is_refused() {
        let occupied = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let wanted = WantedPorts {
            commerce: Some(occupied.local_addr().unwrap().port()),
            ..WantedPorts::default()
        };
        let refusal = Ports::choose(wanted, None, &[]).unwrap_err();
        assert_eq!(refusal.exit, Exit::Usage);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_reserved_port_takes_one_server_after_another_and_nobody_who_would_keep_it() {
        let port = reserve().unwrap();
        for _ in 0..2 {
            let server = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
            assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err());
            drop(server);
        }
        let outgoing = TcpSocket::new_v4().unwrap();
        let refusal = outgoing.bind((Ipv4Addr::LOCALHOST, port).into()).unwrap_err();
        assert_eq!(refusal.kind(), std::io::ErrorKind::AddrInUse);
    }
}
