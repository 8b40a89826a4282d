package com.example.demo;

import java.util.Map;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PathVariable;
import org.springframework.web.bind.annotation.RestController;

@SpringBootApplication
@RestController
public class DemoApplication {
    public static void main(String[] arguments) {
        SpringApplication.run(DemoApplication.class, arguments);
    }

    @GetMapping("/")
    String hello() {
        return "<h1>Hello from Spring Boot</h1>";
    }

    @GetMapping("/greet/{name}")
    Map<String, String> greet(@PathVariable String name) {
        return Map.of("greeting", "Hello, " + name);
    }
}
