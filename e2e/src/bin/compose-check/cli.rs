use clap::Parser;

/// Build and run docker-compose.yml, send requests through it, kill its containers, compare the tables.
#[derive(Debug, Parser)]
#[command(
    name = "compose-check",
    bin_name = "./dev compose-check",
    version,
    before_help = "\
Examples:
  ./dev compose-check                      everything, also where no image can be pulled
  ./dev compose-check --prebuilt --cache   with the binaries in target/release, and images kept for the next time
  ./dev compose-check --load               and a short load test from its own container at the end",
    after_help = "\
An image that can be pulled is pulled. For one that cannot, a stand-in is made under the same name: from debootstrap, Debian
packages, this machine's Rust toolchain and crates, and the servers that ./dev fetches through Maven. A Docker engine that
answers is used; without one, root on a Debian-like system gets docker.io and docker-compose installed, and an engine for the
time of the check. Everything but installed packages is removed at the end.

Exit codes: 0 all is well; 1 failed while running; 2 usage error, nothing was done; 3 something is missing; 99 the tables \
differ; 130, 143 stopped by SIGINT, SIGTERM"
)]
pub(crate) struct Cli {
    /// Put the binaries of target/release into the image instead of compiling in it.
    #[arg(long)]
    pub(crate) prebuilt: bool,
    /// Let Debezium publish (profile `debezium`), and kill it as well.
    #[arg(long)]
    pub(crate) debezium: bool,
    /// Build the image of profile `load` as well, and run a short load test in it at the end.
    #[arg(long)]
    pub(crate) load: bool,
    /// How often each container is killed.
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// Leave the containers running at the end, until Ctrl-C.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Keep the images for the next time.
    #[arg(long)]
    pub(crate) cache: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
