use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context;
use devstack::{
    failure::{Exit, Failure},
    progress::{Progress, seconds},
};

use crate::docker::Docker;

/// The product's image, under a name that no other has.
pub(crate) const NAME: &str = "shipments:compose-check";

const DEADLINE: Duration = Duration::from_secs(60 * 60);
const BINARIES: [&str; 2] = ["logistics-svc", "commerce-consumer"];

/// Builds it from the Dockerfile; with `prebuilt` only its last stage, from the binaries in `target/release`.
pub(crate) async fn build(
    docker: &Docker,
    root: &Path,
    contexts: &Path,
    prebuilt: bool,
    progress: &Progress,
) -> anyhow::Result<()> {
    let step = progress.step("building the image");
    let start = Instant::now();
    if prebuilt {
        let context = contexts.join("prebuilt");
        prepare(docker, root, &context).await?;
        docker
            .build(NAME, &context.join("Dockerfile"), &context, DEADLINE)
            .await?;
    } else {
        docker.build(NAME, &root.join("Dockerfile"), root, DEADLINE).await?;
    }
    let megabytes = docker.size(NAME).await? as f64 / 1e6;
    let base = docker.size("debian:bookworm-slim").await? as f64 / 1e6;
    let took = seconds(start.elapsed());
    step.done(&format!("image built: {megabytes:.0} MB, {base:.0} MB of it the base"));
    progress.note(&format!("  the build took {took}"));
    Ok(())
}

async fn prepare(docker: &Docker, root: &Path, context: &Path) -> anyhow::Result<()> {
    if context.exists() {
        fs::remove_dir_all(context).context("remove the remains of a build")?;
    }
    fs::create_dir_all(context.join("compose")).with_context(|| format!("create {}", context.display()))?;
    for name in BINARIES {
        let binary = root.join("target/release").join(name);
        if !binary.is_file() {
            return Err(Failure::new(
                Exit::Usage,
                format!("--prebuilt: there is no {}", binary.display()),
                "cargo build --release --locked --workspace --bin logistics-svc --bin commerce-consumer",
            )
            .into());
        }
        let mut strip = Command::new("strip");
        strip.args(["--strip-debug", "-o"]).arg(context.join(name)).arg(binary);
        docker.run("strip", strip, DEADLINE).await?;
    }
    fs::copy(root.join("compose/ready"), context.join("compose/ready")).context("copy compose/ready")?;
    let dockerfile = fs::read_to_string(root.join("Dockerfile")).context("read the Dockerfile")?;
    fs::write(context.join("Dockerfile"), last_stage(&dockerfile)?).context("write a Dockerfile")
}

/// The last stage, with the binaries of the context where it expects those of the stage before.
fn last_stage(dockerfile: &str) -> anyhow::Result<String> {
    let (_, last) = dockerfile
        .rsplit_once("\nFROM ")
        .context("the Dockerfile has no stages")?;
    let names = BINARIES.join(" ");
    Ok(format!(
        "FROM scratch AS build\nCOPY {names} /source/target/release/\nFROM {last}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_stage_takes_the_binaries_from_where_they_are_put() {
        let dockerfile = include_str!("../../../../Dockerfile");
        let stage = last_stage(dockerfile).unwrap();
        for name in BINARIES {
            assert!(stage.contains(&format!("/source/target/release/{name}")), "{stage}");
        }
        assert_eq!(stage.matches("FROM ").count(), 2, "{stage}");
    }
}
