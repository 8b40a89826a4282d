from django.db import migrations, models


def stock(apps, schema_editor):
    apps.get_model("catalog", "Product").objects.create(name="A first product")


class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel(
            name="Product",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=100)),
            ],
        ),
        migrations.RunPython(stock, migrations.RunPython.noop),
    ]
