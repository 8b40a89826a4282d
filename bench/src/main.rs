//! Benchmarks of the built binary: deployment time, memory, ingress throughput and others. Where there is a peer to
//! compare with, both run alternately, and the ratio of the medians is printed. Arguments select benchmarks by name.

mod deployments;
mod ingress;
mod memory;
mod plans;
mod sample;
mod spine;

/// The name of a benchmark, and the function that returns its lines of output.
type Benchmark = (&'static str, fn() -> Vec<String>);

const BENCHMARKS: [Benchmark; 9] = [
    ("plan", plans::measure),
    ("rebuild", plans::rebuild),
    ("deploy", deployments::measure),
    ("memory", memory::measure),
    ("size", memory::size),
    ("ingress", ingress::measure),
    ("bus", spine::bus),
    ("relay", spine::relay),
    ("shapes", spine::shapes),
];

fn main() {
    let selected: Vec<String> = std::env::args().skip(1).collect();
    for (name, measure) in BENCHMARKS {
        if selected.is_empty() || selected.iter().any(|word| word == name) {
            println!("{name}");
            for line in measure() {
                println!("  {line}");
            }
        }
    }
}
